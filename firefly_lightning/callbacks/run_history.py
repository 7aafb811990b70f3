"""Keeps in every checkpoint of a training what its model's card tells."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from firefly_lightning.callbacks.run_figures import read_metrics
from firefly_lightning.callbacks.run_folder import csv_folders
from firefly_lightning.callbacks.run_record import goes_on
from firefly_lightning.checkpoints.history import HISTORY, Curve, History, without_folder
from firefly_lightning.data.counts_table import counts_by_kind
from firefly_lightning.data.protocol import data_of
from firefly_lightning.errors import FireflyError

PACKAGES = (
    "firefly-lightning",
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "deepspeed",
    "colossalai",
    "peft",
)
"""Packages whose releases a run's figures depend on."""

COUNTED = ("rows", "tokens", "target_tokens")


class RunHistory(Callback):
    """Keeps the counts of the rows, the losses so far and the last validation, so that they are in every checkpoint.

    ``firefly export`` makes the model's card of it. A resumed run goes on with the losses of the run before.
    """

    def __init__(self) -> None:
        self._history = History()
        self._step = 0

    @property
    def state_key(self) -> str:
        """The name by which an export finds the history."""
        return HISTORY

    def state_dict(self) -> dict[str, Any]:
        """The history so far."""
        return self._history.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the history of the run that is resumed; one that cannot be read is begun anew."""
        try:
            self._history = History.of(state_dict)
        except FireflyError:
            self._history = History()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts the rows, and takes up a validation that came after the checkpoint that is resumed."""
        self._step = trainer.global_step
        self._history.versions = installed(PACKAGES)
        self._history.base = without_folder(str(getattr(pl_module, "path", "")))
        data = data_of(trainer)
        if data is None or data.train is None:
            return
        rows = data.train.rows
        self._history.sources = [without_folder(name) for name in rows.names]
        counts = counts_by_kind(rows.counts)
        self._history.kinds = {kind: {name: numbers[name] for name in COUNTED} for kind, numbers in counts.items()}
        if self._history.figures_step < trainer.global_step and trainer.is_global_zero:
            self._take_validation(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Notes the loss of a step."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._note(trainer, trainer.callback_metrics, "train_loss", "lr")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes what a validation of a training has found."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._note_validation(trainer, {name: float(value) for name, value in trainer.callback_metrics.items()})

    def _take_validation(self, trainer: L.Trainer) -> None:
        """Notes what the validation of the last step has found, where it is in ``metrics.csv`` only."""
        for folder, prefix in csv_folders(trainer)[:1]:
            logged = read_metrics(folder, prefix, before=not goes_on(trainer))
            last = {name: of[trainer.global_step - 1] for name, of in logged.items() if trainer.global_step - 1 in of}
            if "val_loss" in last:
                self._note_validation(trainer, last)

    def _note_validation(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        self._history.figures = {name: value for name, value in metrics.items() if name.startswith("val_")}
        self._history.figures_step = trainer.global_step
        data = data_of(trainer)
        self._history.figures_rows = data.val.count_kinds() if data and data.val else {}
        self._note(trainer, metrics, "val_loss")

    def _note(self, trainer: L.Trainer, metrics: Mapping[str, Any], *names: str) -> None:
        for name in names:
            if name in metrics:
                self._history.curves.setdefault(name, Curve()).add(trainer.global_step, float(metrics[name]))


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Releases of those of some packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
