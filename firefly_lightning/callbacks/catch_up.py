"""What a killed run had saved but neither logged nor validated, its last step, is made up for when it is resumed."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from firefly_lightning.callbacks.run_figures import read_metrics
from firefly_lightning.callbacks.run_folder import csv_folders
from firefly_lightning.checkpoints.layout import LAST_STEP_KEY


class CatchUp(Callback):
    """Logs the metrics of a resumed run's last step and validates it, where ``metrics.csv`` lacks them.

    A step is saved before its metrics are logged and the model is validated, so that a run which is killed in a
    validation need not go back to an earlier step. The metrics are in the checkpoint, too.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the metrics of the last step to a checkpoint."""
        logged = trainer.callback_metrics.items()
        checkpoint[LAST_STEP_KEY] = {name: float(value) for name, value in logged if not name.startswith("val_")}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the metrics of the last step."""
        self._last = checkpoint.get(LAST_STEP_KEY)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs and validates what is missing, before the first step of a resumed run."""
        last, self._last = self._last, None
        if not last or not trainer.global_step:
            return
        unlogged, unvalidated = trainer.strategy.broadcast(_missing(trainer, trainer.global_step - 1))
        if unlogged and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(last, trainer.global_step - 1)
        if unvalidated and _is_due(trainer):
            _validate(trainer)


def _missing(trainer: L.Trainer, step: int) -> tuple[bool, bool]:
    """Whether the runs before this one, of the same folder, have not logged a step, and have no validation after it."""
    for folder, prefix in csv_folders(trainer):
        metrics = read_metrics(folder, prefix, before=True)
        if losses := metrics["train_loss"]:
            return step not in losses, step not in metrics.get("val_loss", {})
    return False, False


def _is_due(trainer: Any) -> bool:
    """Whether Lightning validates after the step that a run is resumed at: by the micro-batches before it."""
    interval, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or interval in (None, float("inf")):
        return False
    done = trainer.global_step * trainer.accumulate_grad_batches
    if every is None:
        return bool(done % interval == 0)
    epoch, before = divmod(done - 1, trainer.num_training_batches)
    return bool((before + 1) % interval == 0 and (epoch + 1) % every == 0)


def _validate(trainer: Any) -> None:
    """Validates as Lightning does after a step."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = connector._first_loop_iter
    loop.restarting, trainer.validating = False, True
    loop.run()
    trainer.training, connector._first_loop_iter = True, first
