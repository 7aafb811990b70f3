"""The script for a GPU, on the processor: its own logic, and that it says what it lacks."""

import json

from tests.support.helpers import json_lines, run_benchmark


def test_a_processor_stands_in_for_a_gpu(tmp_path):
    small = ["--hidden", 64, "--layers", 2, "--heads", 2, "--vocabulary", 500, "--batch_size", 4, "--max_length", 64]
    short = ["--steps", 2, "--warmup", 1, "--device", "cpu", "--no_tests", "--minutes", 20, "--out", tmp_path]
    lines = json_lines(run_benchmark("gpu", *small, *short))
    assert "no GPU" in lines[0]["lacks"]
    by_system = {line["system"]: line for line in lines if "system" in line}
    assert {"firefly", "trainer", "grouped"} <= set(by_system)
    assert by_system["firefly"]["tokens"] == by_system["trainer"]["tokens"], "the same rows"
    assert by_system["firefly"]["planned_gb"] > 0
    assert [line["products"] for line in lines if "products" in line] == ["fp32", "bf16"]
    assert any("profiled" in line for line in lines)
    assert [line["attention_by"] for line in lines if "attention_by" in line] == ["padded", "flex"]
    kept = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert kept == [line for line in lines if line in kept]
    assert kept[-1]["seconds"] > 0
