"""The script kills a run, resumes it and finds the losses of one that nobody killed."""

from tests.support.helpers import json_lines, run_benchmark


def test_a_killed_run_ends_like_another(model_folder, rows_file, tmp_path):
    own = ["--model", str(model_folder), "--rows", str(rows_file), "--out", str(tmp_path / "kills.png")]
    counts = ["--kills", 2, "--steps", 100, "--longest", 0.3]
    _, first, second, whole = json_lines(run_benchmark("kill_and_resume", *counts, *own))
    assert 0 < first["resumes_at"] <= first["last_step_logged"] + 2
    assert first["resumes_at"] <= second["resumes_at"]
    assert (whole["kills"], whole["steps"]) == (2, 100)
    assert (whole["losses_that_differ"], whole["steps_missing_or_doubled"]) == (0, 0)
    assert whole["shown_once_by_tensorboard"] is True
    assert (tmp_path / "kills.png").stat().st_size > 5000
