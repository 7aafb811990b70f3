"""Rows are as long as is asked for, and the bound of memory is the one that is promised."""

import argparse
import json

import pytest

from benchmarks.growth import memory_bound, write_long_rows
from firefly_lightning import FireflyDataModule


@pytest.mark.parametrize("length", [32, 200])
def test_rows_are_of_one_length_and_half_is_learned(model_folder, rows_file, tmp_path, length):
    options = argparse.Namespace(tokenizer=str(model_folder), rows=[str(rows_file)], tokens=400)
    write_long_rows(tmp_path / "rows.jsonl", options, length)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 4 * (400 // length)
    data = FireflyDataModule(
        str(model_folder), train_files=str(tmp_path / "rows.jsonl"), max_length=length, batch_size=1
    )
    data.prepare_data()
    data.setup("fit")
    for step in range(4):
        assert data.train[step]["lengths"] == [length]
        assert 0.3 * length <= len(data.train[step]["target_ids"]) <= 0.6 * length


def test_the_bound_adds_what_weights_gradients_and_moments_grow_by():
    lines = [
        {"axis": "vocabulary", "value": value, "system": system, "peak_rss_gb": peak, "libraries_gb": 0.5}
        for value, system, peak in ((1000, "firefly", 1.0), (1000, "trainer", 9.0), (501_000, "firefly", 2.0))
    ]
    bound = memory_bound(lines, hidden=100)
    assert bound["bound_gb"] == pytest.approx(1.3 + 500_000 * 100 * 16 / 1e9)
    assert bound["holds"]
    lines[-1]["peak_rss_gb"] = 2.2
    assert not memory_bound(lines, hidden=100)["holds"]
    lines[-1]["libraries_gb"] = 0.7
    assert memory_bound(lines, hidden=100)["tokenizer_gb"] == 0.2
    assert memory_bound(lines, hidden=100)["holds"]
