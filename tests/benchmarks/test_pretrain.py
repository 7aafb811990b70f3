"""The script trains on the same documents in both ways, and counts the same tokens."""

import math

import pytest

from benchmarks.peers import blocks
from tests.conftest import write_rows
from tests.support.helpers import json_lines, run_benchmark


def test_documents_one_by_one_and_joined(model_folder, reviews, tmp_path):
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in reviews[:80]])
    own = ["--tokenizer", model_folder, "--rows", rows, "--hidden", 48, "--heads", 6, "--layers", 2]
    counts = ["--steps", 2, "--warmup", 1, "--batch_size", 8, "--threads", 1, "--max_length", 64]
    _, ours, joined = json_lines(run_benchmark("pretrain", *own, *counts))
    assert (ours["system"], joined["system"]) == ("firefly", "joined")
    assert ours["loss"] == pytest.approx(math.log(1500), rel=0.05), "random weights"
    assert joined["loss"] == pytest.approx(ours["loss"], rel=0.05)
    assert joined["tokens"] == pytest.approx(ours["tokens"], rel=0.3), "steps of as many tokens, in blocks"


def test_blocks_hold_the_tokens_in_order():
    assert blocks([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])], 2) == [
        ([1, 2], [True, True]), ([3, 4], [True, True])
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="3 tokens make no block of 4"):
        blocks([([1, 2, 3], [False, True, True])], 4)
