"""What a checkpoint says of the run that saved it, so that the next start goes on as that run, and no two at once."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from firefly_lightning.callbacks.metrics_file import METRICS
from firefly_lightning.callbacks.run_folder import csv_folders
from firefly_lightning.callbacks.run_lock import RunLock
from firefly_lightning.callbacks.run_loggers import versions
from firefly_lightning.checkpoints.layout import RUN_KEY
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import sync


class RunRecord(Callback):
    """Keeps in every checkpoint when its run began and where it logs; sees that all processes resume the same one.

    While it trains, no other run writes into the same folders of figures.

    Args:
        checkpoint: The checkpoint that the run is resumed from, or None.
        before: What the run that saved it said of itself.
        same_run: Whether this is that run, and not one of its own that begins where that one was.
        goes_on: Whether figures are written on where that run has written them.

    Attributes:
        same_run: Whether this is that run.
        goes_on: Whether figures are written on where that run has written them.
    """

    def __init__(
        self,
        checkpoint: Path | None = None,
        before: Mapping[str, Any] | None = None,
        same_run: bool = False,
        goes_on: bool = False,
    ) -> None:
        self.same_run, self.goes_on = same_run, goes_on
        self._checkpoint = str(checkpoint or "")
        self._lock = RunLock()
        earlier = float((before or {}).get("began", 0))
        # Later than any run before it, also where clocks of machines differ.
        self._began = earlier if same_run and earlier else max(time.time(), earlier + 1)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares the checkpoints that the processes have found; where figures go on, the first process says.

        Raises:
            FireflyError: If they are not the same, as where a file system shows a machine late what is there, or if
                another run writes its figures where this one would.
        """
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._take_folders(trainer)
        first = trainer.strategy.broadcast(self._checkpoint)
        if not trainer.strategy.reduce_boolean_decision(first == self._checkpoint, all=True):
            found = first or "none"
            raise FireflyError(
                f"the processes of this run have found different checkpoints, the first one {found}; "
                "start again once all machines see the same files"
            )
        self.goes_on = trainer.strategy.broadcast(self.goes_on)

    def _take_folders(self, trainer: L.Trainer) -> None:
        problem = None
        if trainer.is_global_zero:
            try:
                self._lock.take(folder for folder, _ in csv_folders(trainer))
            except FireflyError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise FireflyError(problem)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets other runs write."""
        self._lock.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lets other runs write."""
        self._lock.release()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the record to a checkpoint; the metrics up to there survive a power failure as it does."""
        if trainer.is_global_zero:
            checkpoint[RUN_KEY] = {"began": self._began, "logs": versions(trainer.loggers)}
            for folder, _ in csv_folders(trainer):
                if (file := folder / METRICS).is_file():
                    sync(file)


def is_same_run(trainer: L.Trainer) -> bool:
    """Whether a run is the one that saved the checkpoint that it is resumed from."""
    return any(record.same_run for record in _records(trainer))


def goes_on(trainer: L.Trainer) -> bool:
    """Whether a run goes on with the figures of the run that it resumes."""
    return any(record.goes_on for record in _records(trainer))


def _records(trainer: L.Trainer) -> list[RunRecord]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RunRecord)]
