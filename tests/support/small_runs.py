"""Runs of Lightning's own Trainer on a model of a few thousand parameters, which take some hundredths of a second."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback

from firefly_lightning import AtomicCheckpointIO, FireflyDataModule, FireflyModule
from firefly_lightning.callbacks.checkpoints import LastCheckpoint
from tests.conftest import write_rows

BATCH_SIZE = 8
KINDS = ["对联", "QA: zh", "a/b", "NER"]
"""Kinds whose names no file can have, or every one."""


@pytest.fixture(scope="session")
def short_rows(tmp_path_factory) -> Path:
    """38 rows: four whole steps of eight, and one of six."""
    return written(tmp_path_factory, 38)


@pytest.fixture(scope="session")
def short_val_rows(tmp_path_factory) -> Path:
    return written(tmp_path_factory, 20, first=100)


def written(tmp_path_factory, count: int, first: int = 0) -> Path:
    rows = [
        {"kind": KINDS[index % len(KINDS)], "input": f"说{index}" * (1 + index % 3), "target": f"好{index % 7}"}
        for index in range(first, first + count)
    ]
    return write_rows(tmp_path_factory.mktemp("short") / "rows.jsonl", rows)


class Noting(Callback):
    """Notes rows, loss and rate of every step, the rows and the step of every validation, and the epoch at the end."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}
        self.validated: dict[int, list[int]] = {}
        self.epoch = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.global_step, []).extend(batch["rows"].tolist())

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.rates[trainer.global_step] = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses[trainer.global_step - 1] = float(trainer.callback_metrics["train_loss"])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.validated.setdefault(trainer.global_step, []).extend(batch["rows"].tolist())

    def on_train_end(self, trainer, pl_module):
        self.epoch = trainer.current_epoch


class Interrupting(Callback):
    """Sends a signal to its own process in the first micro-batch of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == 0:
            signal.raise_signal(signal.SIGTERM)


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a trainer that shows nothing."""
    return {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "plugins": [AtomicCheckpointIO()], **changes,
    }  # fmt: skip


def train(
    model: Path,
    rows: Path,
    root: Path,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | str | None = None,
    data: dict[str, Any] | None = None,
    module: FireflyModule | None = None,
    every: int = 1000,
    **trainer: Any,
) -> Noting:
    """Trains, and saves `last.ckpt` into the folder ``root``; gives what was noted."""
    noting = Noting()
    L.seed_everything(0, verbose=False)
    module = module or FireflyModule(str(model), learning_rate=1e-2, warmup_steps=2)
    last = LastCheckpoint(every_n_steps=every, dirpath=str(root / "checkpoints"))
    own = settings(default_root_dir=root, callbacks=[*callbacks, noting, last], **trainer)
    with signals_kept():
        L.Trainer(**own).fit(module, datamodule=make_data(model, rows, **(data or {})), ckpt_path=ckpt_path)
    return noting


def make_data(model: Path, rows: Path, **options: Any) -> FireflyDataModule:
    return FireflyDataModule(str(model), str(rows), **{"batch_size": BATCH_SIZE, "micro_batch_size": 2, **options})


def plan_rows(model: Path, rows: Path, steps: int) -> dict[int, list[int]]:
    """The rows of each step of a run without limits, sorted; other tests check the plan."""
    data = make_data(model, rows)
    data.prepare_data()
    data.setup("fit")
    return {step: np.sort(data.train.plan.rows(step)).tolist() for step in range(steps)}


@contextmanager
def signals_kept() -> Iterator[None]:
    """Gives signals their handlers back at the end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
