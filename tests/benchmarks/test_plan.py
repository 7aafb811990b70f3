"""The script trains real steps, and what was foretold is what they took."""

import json
import sys

from benchmarks import plan


def test_memory_of_one_process_is_as_foretold(model_folder, rows_file, monkeypatch, capsys):
    own = ["--tokenizer", model_folder, "--rows", rows_file, "--strategies", "auto", "--sizes", "768x6"]
    own += ["--micro_batch_size", 1]
    monkeypatch.setattr(sys, "argv", ["benchmarks.plan", *map(str, own)])
    plan.main()
    _, found = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert found["parameters"] == 1500 * 768 + 6 * (12 * 768**2 + 13 * 768) + 4 * 768
    assert found["measured"] > 16 * found["parameters"], "weights, gradients and two moments in float32"
    assert abs(found["predicted"] / found["measured"] - 1) < 0.15
    assert found["difference"] == found["predicted"] / found["measured"] - 1
