"""The script trains a model of the size it is told, saves, resumes, and knows what was foretold."""

import pytest

from benchmarks.full_size import held_to_goals
from tests.support.helpers import json_lines, run_benchmark


def test_a_small_model_in_full_and_by_an_adapter(model_folder, rows_file, tmp_path):
    own = ["--tokenizer", model_folder, "--rows", rows_file, "--vocabulary", 1500, "--sizes", "64x2x4", "--threads", 1]
    ways = ["--ways", "full, AdamW, 16 bits", "LoRA", "Trainer with peft", "--steps", 1, "--out", tmp_path / "out.png"]
    _, full, lora, peer = json_lines(run_benchmark("full_size", *own, *ways))
    assert (full["size"], full["way"], lora["way"]) == ("64x2x4", "full, AdamW, 16 bits", "LoRA")
    parameters = 1500 * 64 + 2 * (12 * 64**2 + 13 * 64) + 4 * 64
    # Weights and two moments in 16 bits; an adapter's are 16 · 16 · 64 numbers in float32, beside tokenizer and names.
    assert full["checkpoint_mb"] * 1e6 > 6 * parameters
    assert lora["checkpoint_mb"] < full["checkpoint_mb"]
    assert lora["tokens"] == full["tokens"] == peer["tokens"] > 0
    assert lora["loss"] == pytest.approx(peer["loss"], abs=2e-3), "an adapter of zeros on the same weights"
    assert 0 < lora["planned_gb"] + lora["libraries_gb"] < 1
    assert min(lora["load_seconds"], lora["resume_seconds"], lora["resume_peak_gb"], lora["save_peak_gb"]) > 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_goals_are_in_gib_of_the_highest_peak():
    way = {"way": "QLoRA", "difference": "-4.0%", "peak_gb": 6.0, "load_peak_gb": 2 * 2**30 / 1e9 + 6.5}
    other = {"size": "1b4", "way": "LoRA", "difference": "+11.5%", "peak_gb": 1.0}
    assert held_to_goals([{"cpu": "Abacus 9000"}, {"size": "2b6", **way}, other]) == [
        "2b6, QLoRA: 8.1 GiB at the most (goal 10).",
        "The plan differs from what was taken by 11.5% at the most (goal 10%).",
    ]
