"""The script answers the same rows in every system, and compares them."""

from benchmarks.answers import SYSTEMS, compared
from tests.support.helpers import json_lines, run_benchmark


def test_the_same_rows_are_answered_by_every_system(model_folder, rows_file):
    own = ["--tokenizer", model_folder, "--rows", rows_file, "--models", "48x2x6"]
    _, *lines, first_start, second, third = json_lines(
        run_benchmark("answers", *own, "--count", 6, "--batch_sizes", 3, "--threads", 1)
    )
    assert [line["system"] for line in lines] == list(SYSTEMS)
    first = lines[0]
    assert first["tokens"] > 40
    assert {line["tokens"] for line in lines[:3]} == {first["tokens"]}
    assert not any("same_answers" in line for line in lines), "random weights say one token again and again"
    assert [line["starts"] for line in (first_start, second, third)] == ["float32", "bfloat16", "q8_0"]
    started, *_, remark = compared([*lines, first_start, second, third])
    assert f"the first characters {first_start['seconds']} s after its imports" in started
    ours = next(line for line in lines if line["system"] == "firefly")
    assert f"{ours['tokens_per_second'] / first['tokens_per_second']:.1f} times generate" in remark
