"""The script trains the same adapter in both systems, and counts what a frozen head spares."""

import pytest

from benchmarks.lora import compared
from tests.support.helpers import json_lines, run_benchmark


def test_an_adapter_here_and_under_trainer(model_folder, rows_file):
    own = ["--tokenizer", model_folder, "--rows", rows_file, "--hidden", 48, "--heads", 6, "--layers", 2]
    counts = ["--steps", 1, "--warmup", 1, "--batch_size", 8, "--threads", 1]
    _, ours, full, theirs, head = json_lines(run_benchmark("lora", *own, *counts))
    assert (ours["system"], full["system"], theirs["system"]) == ("lora", "firefly", "peft")
    assert ours["tokens"] == full["tokens"] == theirs["tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
    assert min(head["frozen_seconds"], head["trained_seconds"], head["targets"]) > 0
    first, second = compared([ours, full, theirs, head])
    assert f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.1f} times the tokens/s of Trainer" in first
    assert f"takes {head['frozen_seconds']} s with a frozen head" in second
