"""The script measures what is held: figures that follow from the arithmetic of Adam in fp32."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def test_memory_of_two_strategies(model_folder, rows_file):
    """Where every process holds all, 4 bytes of weights and gradients, 8 of moments; FSDP2 would halve each."""
    sizes = [
        "--hidden",
        "128",
        "--layers",
        "2",
        "--max_length",
        "512",
        "--tokenizer",
        str(model_folder),
        "--rows",
        str(rows_file),
    ]
    command = [sys.executable, "-m", "benchmarks.strategy_memory", "--strategies", "ddp", "native_tp", *sizes]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    _, *lines = (line for line in result.stdout.splitlines() if line.startswith("{"))
    table, found = result.stdout.split(lines[-1])[1], {}
    for line in map(json.loads, lines):
        (rank, other), parameters = line["ranks"], line["parameters"]
        assert parameters == 1500 * 128 + 2 * (12 * 128 * 128 + 13 * 128) + 4 * 128
        found[line["strategy"]] = [max(rank[part], other[part]) / parameters for part in ("weights", "states")]
        gradients = max(rank["gradients"], other["gradients"]) / parameters
        found[line["strategy"]].insert(1, gradients)
    assert found["ddp"] == pytest.approx([4, 4, 8], rel=0.05)
    assert found["native_tp"] == pytest.approx([2, 2, 4], rel=0.1)  # biases and norms are whole everywhere
    assert "4 + 4 + 8 = 16" in table
