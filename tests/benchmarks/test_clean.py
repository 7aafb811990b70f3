"""What is measured of cleaning: the rows, and what each system leaves out; datatrove is run for real."""

import random

import pytest

from benchmarks.clean import made_rows
from tests.support.helpers import json_lines, run_benchmark


@pytest.mark.parametrize("part", [None, 12])
def test_rows_have_copies_and_near_copies(part):
    real = [{"kind": "K", "input": f"问题{number}" * 20, "target": f"回答{number}"} for number in range(200)]
    rows = list(made_rows(real, 2000, part, random.Random(0)))
    assert len(rows) == 2000
    texts = [row["input"] for row in rows]
    assert 50 < len(texts) - len(set(texts)) < 200


def test_systems_agree_on_most_of_what_is_left_out(rows_file, tmp_path):
    options = ["--rows", rows_file, "--count", 600, "--cores", 2, "--out", tmp_path / "clean.png"]
    lines = json_lines(run_benchmark("clean", *options))
    by_system = {line["system"]: line for line in lines if "system" in line}
    assert by_system["firefly"]["kept"] == by_system["one_process"]["kept"] < 600
    assert lines[-1]["same_bytes"]
    assert lines[-1]["left_out_by_both"] > 0.5 * (600 - by_system["firefly"]["kept"])
    assert (tmp_path / "clean.png").stat().st_size > 5000


def test_memory_of_all_processes_is_drawn(rows_file, tmp_path):
    options = ["--rows", rows_file, "--count", 20_000, "--cores", 2, "--out", tmp_path / "memory.png"]
    line = json_lines(run_benchmark("clean_large", *options))[-1]
    assert 0 < line["kept"] < line["rows"] == 20_000
    assert 0.03 < line["memory_gb"] < 1  # pyarrow and numpy alone hold more than the one, their files count for nothing
    assert (tmp_path / "memory.png").stat().st_size > 5000
