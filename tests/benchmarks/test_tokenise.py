"""The script makes rows that differ, tokenises them in two ways to the same tokens, and times a cached start."""

from benchmarks.tokenise import changed
from tests.support.helpers import json_lines, run_benchmark

SYSTEMS = ("--systems", "firefly", "cached_start", "row_by_row")


def test_two_ways_to_the_same_tokens(model_folder, rows_file, tmp_path):
    single = tmp_path / "single.jsonl"  # row by row knows no later turns
    lines = [line for line in rows_file.read_text("utf-8").splitlines(keepends=True) if "</s>" not in line]
    single.write_text("".join(lines), "utf-8")
    own = ["--rows", single, "--tokenizer", model_folder, "--count", 300, "--sample", 100]
    _, ours, start, theirs, whole = json_lines(
        run_benchmark("tokenise", *SYSTEMS, *own, "--out", tmp_path / "rows.png")
    )
    assert theirs["tokens"] == ours["tokens_of_sample"] > 100 * 20
    assert 2 * ours["tokens_of_sample"] < ours["tokens"] < 4 * ours["tokens_of_sample"]
    assert (ours["rows"], theirs["rows"], start["rows_in_batch"]) == (300, 100, 16)
    parts = start["prepare_data"] + start["setup"] + start["first_batch"]
    assert abs(start["seconds"] - parts) < 0.1
    assert whole["same_tokens"] is True
    assert (tmp_path / "rows.png").stat().st_size > 5000


def test_no_two_rows_are_the_same():
    real = [{"kind": "A", "input": "一，二。三！", "target": "四"}, {"kind": "A", "input": "", "target": "五"}]
    rows = list(changed(real, 8))
    assert len({row["input"] for row in rows}) == 8
    assert [row["target"] for row in rows] == ["四", "五"] * 4
    assert [rows[number]["input"].replace(str(number), "") for number in (0, 2, 4, 6)] == [
        "一，二。三！",
        "二。三！一，",
        "三！一，二。",
        "一，二。三！",
    ]
