"""The script kills a run, resumes it and finds the losses of one that nobody killed."""

import json
import subprocess
import sys

from tests.helpers import ROOT


def test_a_killed_run_ends_like_another(model_folder, rows_file, tmp_path):
    own = ["--model", str(model_folder), "--rows", str(rows_file), "--out", str(tmp_path / "kills.png")]
    command = [
        sys.executable,
        "-m",
        "benchmarks.kill_and_resume",
        "--kills",
        "2",
        "--steps",
        "100",
        "--longest",
        "0.3",
        *own,
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    lines = (line for line in result.stdout.splitlines() if line.startswith("{"))
    _, first, second, whole = map(json.loads, lines)
    assert 0 < first["resumes_at"] <= first["last_step_logged"] + 2
    assert first["resumes_at"] <= second["resumes_at"]
    assert (whole["kills"], whole["resumed"], whole["steps"], whole["losses_that_differ"]) == (2, 2, 100, 0)
    assert whole["losses_compared"] == 100 + whole["steps_made_again"] - whole["saved_but_not_logged"]
    assert (tmp_path / "kills.png").stat().st_size > 5000
