"""The script measures what is held: figures that follow from the arithmetic of Adam in fp32."""

import pytest

from tests.support.helpers import json_lines, run_benchmark


def test_memory_of_two_strategies(model_folder, rows_file):
    """Where every process holds all, 4 bytes of weights and gradients, 8 of moments; FSDP2 would halve each."""
    sizes = ["--hidden", 128, "--layers", 2, "--max_length", 512, "--tokenizer", model_folder, "--rows", rows_file]
    output = run_benchmark("strategy_memory", "--strategies", "ddp", "native_tp", *sizes)
    found = {}
    for line in json_lines(output)[1:]:
        (rank, other), parameters = line["ranks"], line["parameters"]
        assert parameters == 1500 * 128 + 2 * (12 * 128 * 128 + 13 * 128) + 4 * 128
        found[line["strategy"]] = [max(rank[part], other[part]) / parameters for part in ("weights", "states")]
        gradients = max(rank["gradients"], other["gradients"]) / parameters
        found[line["strategy"]].insert(1, gradients)
    assert found["ddp"] == pytest.approx([4, 4, 8], rel=0.05)
    assert found["native_tp"] == pytest.approx([2, 2, 4], rel=0.1)  # biases and norms are whole everywhere
    assert "4 + 4 + 8 = 16" in output
