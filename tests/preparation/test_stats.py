"""Figures of rows against a count of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager

from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.stats import stats
from tests.conftest import write_rows


@pytest.fixture
def files(tmp_path, reviews):
    rows = [
        {"kind": ["Summary", "NER"][at % 3 == 0], "input": review[: 20 + at], "target": review[-(5 + at % 40) :]}
        for at, review in enumerate(reviews[:90])
    ]
    return [str(write_rows(tmp_path / "a.jsonl", rows[:50])), str(write_rows(tmp_path / "b.jsonl", rows[50:]))]


def read_rows(files):
    return [json.loads(line) for name in files for line in Path(name).read_text("utf-8").splitlines()]


def tokens(tokenizer, row):
    """Lengths of the prompt `<s>` input `</s></s>` and of the target with its `</s>`."""
    return [
        len(tokenizer(row[name], add_special_tokens=False)["input_ids"]) + controls
        for name, controls in (("input", 3), ("target", 1))
    ]


@pytest.mark.parametrize("max_length", [40, 70])
def test_counts_are_those_of_a_loop(files, tmp_path, tokenizer, tiny_folder, max_length, capsys):
    stats(files, str(tiny_folder), str(tmp_path / "out"), max_length=max_length)
    report = json.loads((tmp_path / "out" / "stats.json").read_text("utf-8"))
    assert list(report["kinds"]) == ["all", "Summary", "NER"]
    for kind, of in report["kinds"].items():
        lengths = [tokens(tokenizer, row) for row in read_rows(files) if kind in ("all", row["kind"])]
        whole = np.array([sum(pair) for pair in lengths])
        lost = [pair for pair in lengths if pair[0] >= max_length]
        assert of["rows"] == len(lengths)
        assert of["share"] == pytest.approx(len(lengths) / 90)
        assert of["tokens"] == whole.sum()
        assert of["target_tokens"] == sum(target for _, target in lengths)
        assert (of["mean"], of["longest"]) == (pytest.approx(whole.mean()), whole.max())
        assert [of["p50"], of["p90"], of["p99"]] == pytest.approx(np.quantile(whole, [0.5, 0.9, 0.99]).tolist())
        assert of["beyond"] == pytest.approx(np.mean(whole > max_length))
        assert of["truncated"] == np.count_nonzero(whole > max_length)
        assert of["no_target"] == len(lost)
        assert of["truncated_tokens"] == sum(np.maximum(whole - max_length, 0)) + max_length * len(lost)
    whole = [sum(tokens(tokenizer, row)) for row in read_rows(files)]
    width, bars = report["histogram"]["tokens_a_bar"], report["histogram"]["rows"]
    assert bars == [sum(at * width <= length < (at + 1) * width for length in whole) for at in range(len(bars))]
    assert f"over {max_length}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tasks.png", "lengths.png", "stats.json"}


def test_padding_is_that_of_micro_batches(files, tmp_path, tokenizer, tiny_folder):
    """Rows one by one need no padding; all together are padded to the longest."""
    whole = [sum(tokens(tokenizer, row)) for row in read_rows(files)]
    shares = {}
    for micro_batch_size, batch_size in ((1, 90), (90, 90), (10, 90)):
        out = tmp_path / str(micro_batch_size)
        stats(files, str(tiny_folder), str(out), 9999, batch_size=batch_size, micro_batch_size=micro_batch_size)
        shares[micro_batch_size] = json.loads((out / "stats.json").read_text("utf-8"))["kinds"]["all"]["padding"]
    assert shares[1] == 0
    assert shares[90] == pytest.approx(1 - sum(whole) / (90 * max(whole)))
    ordered = sorted(whole)
    padded = sum(10 * max(ordered[at : at + 10]) for at in range(0, 90, 10))
    assert shares[10] == pytest.approx(1 - sum(whole) / padded)


def test_mistakes_leave_no_folder(files, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    chinese = write_rows(tmp_path / "c.jsonl", [{"kind": "对联", "input": "问", "target": "答"}])
    for arguments, message in (
        ({"files": [str(chinese)]}, "no installed font has 对 联"),
        ({"max_length": 0}, "--max_length and --batch_size must be at least 1"),
        ({"out": str(tmp_path)}, "is not empty"),
        ({"micro_batch_size": 7}, "does not divide the 16 rows"),
        ({"files": ["missing.jsonl"]}, "no such file"),
        ({"prompt": "x"}, "no format is called 'x'"),
    ):
        with pytest.raises(FireflyError, match=message):
            stats(**{"files": files, "tokenizer": str(tiny_folder), "out": str(tmp_path / "out"), **arguments})
        assert not (tmp_path / "out").exists()
