"""A run that is killed right after it has saved a step lacks neither the step's metrics nor its validation."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from firefly_lightning import FireflyModule
from firefly_lightning.callbacks.catch_up import CatchUp
from firefly_lightning.callbacks.run_figures import read_metrics
from tests.support.small_runs import Noting, train

STEPS = 7


class Killed(Exception):
    """What ends a run where a kill would."""


class DyingOnceSaved(FireflyModule):
    """Ends after the callbacks have saved a step, before Lightning logs it."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.global_step == self.last and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            raise Killed


class DyingInValidation(FireflyModule):
    def validation_step(self, batch, batch_idx):
        if self.global_step == self.last:
            raise Killed
        super().validation_step(batch, batch_idx)


def make(kind, model, last=0) -> FireflyModule:
    module = kind(str(model), learning_rate=1e-2, warmup_steps=2)
    module.last = last
    return module


INTERVALS = {
    "every second step": ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 4, 5),
    "every epoch": ({}, 5, 3),
    "within epochs": ({"val_check_interval": 3}, 3, 5),
    "every second epoch of three steps": ({"limit_train_batches": 3, "check_val_every_n_epoch": 2}, 6, 3),
}
"""When a run validates: the trainer's arguments, a number of steps after which it does, and one after which not."""


@pytest.fixture(params=INTERVALS)
def run_of(request, tiny_folder, short_rows, short_val_rows):
    """Makes runs that validate at an interval; with the two numbers of it."""
    arguments, *steps = INTERVALS[request.param]

    def run(root: Path, module: FireflyModule, ckpt_path=None) -> Noting:
        logger = CSVLogger(root, flush_logs_every_n_steps=1)
        return train(tiny_folder, short_rows, root, [CatchUp()], ckpt_path, {"val_files": str(short_val_rows)}, module,
                     every=1, max_steps=STEPS, logger=logger, log_every_n_steps=1, **arguments)  # fmt: skip

    return run, steps


def test_nothing_is_missing(run_of, tiny_folder, tmp_path):
    run, (validated, other) = run_of
    run(tmp_path / "whole", make(FireflyModule, tiny_folder))
    expected = read_metrics(tmp_path / "whole" / "lightning_logs" / "version_0")
    assert sorted(expected["train_loss"]) == list(range(STEPS))
    assert validated - 1 in expected["val_loss"]
    assert other - 1 not in expected["val_loss"]
    for kind, last in ((DyingOnceSaved, validated), (DyingOnceSaved, other), (DyingInValidation, validated)):
        root = tmp_path / f"{kind.__name__}-{last}"
        with pytest.raises(Killed):
            run(root, make(kind, tiny_folder, last))
        resumed = run(root, make(FireflyModule, tiny_folder), root / "checkpoints" / "last.ckpt")
        assert min(resumed.losses, default=STEPS) == last
        found = both_versions(root)
        for name in ("train_loss", "lr", "grad_norm", "val_loss", "val_perplexity_of/NER"):
            assert {step: float(value) for step, value in found[name].items()} == expected[name], (kind, last, name)


def both_versions(root: Path) -> dict[str, dict[int, str]]:
    """Metrics of two runs by name and step; no step may have a metric twice."""
    found: dict[str, dict[int, str]] = {}
    for version in range(2):
        with (root / "lightning_logs" / f"version_{version}" / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value:
                        assert int(row["step"]) not in found.get(name, {}) or name in ("step", "epoch"), name
                        found.setdefault(name, {})[int(row["step"])] = value
    return found


def test_a_resumed_run_that_lacks_nothing_logs_nothing_twice(tiny_folder, short_rows, short_val_rows, tmp_path):
    for ckpt_path, steps in ((None, 4), (tmp_path / "checkpoints" / "last.ckpt", 6)):
        train(tiny_folder, short_rows, tmp_path, [CatchUp()], ckpt_path, {"val_files": str(short_val_rows)}, every=2,
              max_steps=steps, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1), log_every_n_steps=1,
              val_check_interval=2, check_val_every_n_epoch=None)  # fmt: skip
    metrics = read_metrics(tmp_path / "lightning_logs" / "version_1", before=True)
    assert sorted(metrics["train_loss"]) == [0, 1, 2, 3]
    with (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == [4, 5]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [5]
