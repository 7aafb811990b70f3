"""The script has every system learn the same pairs, and counts their tokens in the same way."""

from importlib.util import find_spec

import pytest

from benchmarks.preference import compared
from tests.support.helpers import json_lines, run_benchmark

SYSTEMS = ["firefly", "twice", "trl"] if find_spec("trl") else ["firefly", "twice"]
"""TRL is in the environment of the current stack alone."""


def test_the_same_pairs_here_and_under_trl(model_folder, rows_file):
    own = ["--tokenizer", model_folder, "--rows", rows_file, "--hidden", 48, "--heads", 6, "--layers", 2]
    counts = ["--steps", 2, "--warmup", 1, "--batch_size", 4, "--threads", 1, "--systems", *SYSTEMS]
    _, *lines = json_lines(run_benchmark("preference", *own, *counts))
    assert [line["system"] for line in lines] == SYSTEMS
    assert len({line["tokens"] for line in lines}) == 1
    assert 0.5 < lines[0]["computed_share"] < 1
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(lines[0]["loss"], abs=2e-3)
    remarks = compared(lines)
    assert len(remarks) == len(SYSTEMS) - 1
    assert "computing the prompt of a pair once is" in remarks[-1]
