"""``metrics.csv`` is what Lightning's own writer writes, and survives kills and starts."""

import os
import signal
import sys

import pytest
import torch
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from firefly_lightning.callbacks.metrics_file import MetricsFile, cut_rows, read_rows
from tests.support.helpers import forked

LOGGED = [
    {"train_loss": torch.tensor(2.5), "lr": 1e-3, "epoch": 0},
    {"train_loss": torch.tensor(1 / 3), "lr": 2e-5, "epoch": 0},
    {"val_loss": 2.25, 'val_accuracy_of/问, "答"': 0.5, "epoch": 0},
    {"train_loss": float("nan"), "lr": 0.0, "epoch": 1},
]
STEPS = [0, 1, 1, 2]


def log(writer, start=0) -> None:
    for values, step in list(zip(LOGGED, STEPS, strict=True))[start:]:
        writer.log_metrics(values, step)
        writer.save()


def test_it_is_what_lightning_writes(tmp_path):
    for name, kind in (("ours", MetricsFile), ("theirs", ExperimentWriter)):
        (tmp_path / name).mkdir()
        log(kind(str(tmp_path / name)))
    ours, theirs = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
    assert "问" in ours.decode()


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_later_start_writes_on(start, tmp_path):
    (tmp_path / "whole").mkdir()
    log(MetricsFile(str(tmp_path / "whole")))
    (tmp_path / "parts").mkdir()
    first = MetricsFile(str(tmp_path / "parts"))
    for values, step in list(zip(LOGGED, STEPS, strict=True))[:start]:
        first.log_metrics(values, step)
    first.save()
    log(MetricsFile(str(tmp_path / "parts")), start)
    assert (tmp_path / "parts" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_rows_of_steps_that_are_made_again_are_cut(tmp_path):
    file = tmp_path / "metrics.csv"
    log(MetricsFile(str(tmp_path)))
    whole = file.read_bytes()
    cut_rows(file, 3)
    assert file.read_bytes() == whole
    file.write_bytes(whole + b"3,0.")
    assert [row["step"] for row in read_rows(file)] == ["0", "1", "1", "2"]
    cut_rows(file, 3)
    assert file.read_bytes() == whole, "a row that a kill has cut is none"
    cut_rows(file, 2)
    assert [row["step"] for row in read_rows(file)] == ["0", "1", "1"]
    assert read_rows(file)[2]['val_accuracy_of/问, "答"'] == "0.5"
    cut_rows(file, 0)
    assert read_rows(file) == []
    log(MetricsFile(str(tmp_path)))
    assert file.read_bytes() == whole
    cut_rows(tmp_path / "none.csv", 1)
    assert not (tmp_path / "none.csv").exists()


def write_for_ever(folder: str) -> None:
    writer = MetricsFile(folder)
    for number in range(sys.maxsize):
        writer.log_metrics({"train_loss": 1.0, f"val_loss_of/{number}": 2.0}, number)
        writer.save()


def test_a_new_column_costs_no_row_whenever_the_writer_is_killed(tmp_path):
    """Each row brings a column, for which the whole file is written anew."""
    for name in range(5):
        folder = tmp_path / str(name)
        folder.mkdir()
        process = forked(write_for_ever, str(folder))
        while len(read_rows(folder / "metrics.csv")) < 10 + name:
            assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        steps = [int(row["step"]) for row in read_rows(folder / "metrics.csv")]
        assert steps == list(range(len(steps)))
        assert len(steps) >= 10 + name
