"""The script saves, resumes and trains at the size it is told, and holds the figures against the disk's."""

import pytest

from benchmarks.saves import held_to_goals, median
from tests.support.helpers import json_lines, run_benchmark


def test_a_small_model_is_saved_resumed_and_trained(model_folder, rows_file, tmp_path):
    own = ["--tokenizer", model_folder, "--rows", rows_file, "--vocabulary", 1500, "--size", "64x2x4", "--threads", 1]
    more = ["--rounds", 1, "--steps", 6, "--place", tmp_path]
    about, *lines = json_lines(run_benchmark("saves", *own, *more))
    assert about["size"] == "64x2x4"
    found = {line["what"]: line for line in lines if "what" in line}
    parameters = 1500 * 64 + 2 * (12 * 64**2 + 13 * 64) + 4 * 64
    for name in ("save", "save beside a training", "resume, 1 processes", "resume, 2 processes"):
        assert found[name]["gb"] == pytest.approx(12 * parameters / 1e9, abs=0.006), name
    assert found["save beside a training"]["seconds"] <= found["save beside a training, whole"]["seconds"]
    waits, goes_on = (line for line in lines if "training" in line)
    assert (waits["training"], goes_on["training"]) == ("waits", "goes on")
    assert goes_on["same_losses"]
    assert not list(tmp_path.iterdir())


def test_a_share_is_of_the_disk_in_the_same_round():
    disk, read = "dd, past the cache", "dd, read past the cache"
    rounds = [{disk: (10, 1.0), "save": (10, 2.0), read: (10, 4.0), "resume, 1 processes": (10, 5.0)}] * 2
    rounds.append({disk: (10, 10.0), "save": (10, 10.0), read: (10, 4.0), "resume, 1 processes": (10, 4.0)})
    assert median("save", rounds)["of_disk"] == 0.5
    assert median("resume, 1 processes", rounds) == {
        "what": "resume, 1 processes", "gb": 0.0, "seconds": 5.0, "gb_per_second": 0.0, "of_disk": 0.8,
    }  # fmt: skip


def test_goals():
    lines = [
        {"cpu": "Abacus 9000"},
        {"what": "save", "of_disk": 0.9},
        {"what": "dd, flushed", "of_disk": 0.5},
        {"training": "goes on", "of_synchronous": 0.12, "first_of_synchronous": 0.2, "step_seconds": 2.0,
         "step_seconds_beside_a_write": 2.5, "same_losses": True},
    ]  # fmt: skip
    assert held_to_goals(lines) == [
        "save: 0.90 of the disk's own pace (goal 0.8).",
        "A training stands still for 12% of a save that it waits for (goal 15%), for 20% at its first save; a step "
        "beside a write takes 1.25 times as long as another. The losses are the same.",
    ]
