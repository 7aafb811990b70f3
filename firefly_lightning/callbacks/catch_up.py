"""What a killed run had saved but neither logged nor validated, its last step, is made up for when it is resumed."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from firefly_lightning.callbacks.checkpoints import BestCheckpoint
from firefly_lightning.callbacks.metrics_file import METRICS, cut_rows
from firefly_lightning.callbacks.run_figures import read_metrics
from firefly_lightning.callbacks.run_folder import csv_folders
from firefly_lightning.callbacks.run_record import goes_on
from firefly_lightning.checkpoints.layout import LAST_STEP_KEY


class CatchUp(Callback):
    """Makes figures and checkpoint agree when a run is resumed.

    A step is saved before its metrics are logged and the model is validated, so that a run which is killed in a
    validation need not go back to an earlier step. The metrics are in the checkpoint, too: where ``metrics.csv`` lacks
    them, they are logged, and the step is validated. Where the run goes on in the files of the run before it, the steps
    after the checkpoint, which that run made and this one makes again, are taken out of them.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # of the step that the run is resumed after
        self._step, self._done = 0, False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the metrics of the last step to a checkpoint."""
        logged = trainer.callback_metrics.items()
        last = {name: float(value) for name, value in logged if not name.startswith("val_")}
        resumed = self._last and trainer.global_step == self._step  # when no step has been made yet
        checkpoint[LAST_STEP_KEY] = self._last if resumed else {**last, "epoch": trainer.current_epoch}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the metrics of the last step."""
        self._last, self._step = checkpoint.get(LAST_STEP_KEY) or {}, checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs and validates what is missing, before the first step of a resumed run."""
        self._done = True
        if not self._last or not trainer.global_step:
            _mark_start(trainer, 0)
            return
        unlogged, unvalidated = trainer.strategy.broadcast(_missing(trainer, trainer.global_step - 1))
        unvalidated = unvalidated and _is_due(trainer)
        _take_up(trainer, self._last, unlogged, unvalidated)
        if unvalidated:
            _validate(trainer, int(self._last.get("epoch", trainer.current_epoch)))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the last step of a run that had made all its steps, but was killed before it logged that one."""
        if not self._done and self._last and trainer.is_global_zero and goes_on(trainer):
            unlogged, _ = _missing(trainer, trainer.global_step - 1)
            _take_up(trainer, self._last, unlogged, False)


def _missing(trainer: L.Trainer, step: int) -> tuple[bool, bool]:
    """Whether the runs before this one, of the same folder, have not logged a step, and have no validation after it.

    A validation whose model is one of the best is missing, too, where it was logged but that model was not saved.
    """
    for folder, prefix in csv_folders(trainer):
        metrics = read_metrics(folder, prefix, before=not goes_on(trainer))
        if metrics["train_loss"] or goes_on(trainer):
            last = {name: values[step] for name, values in metrics.items() if step in values}
            best = (one for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint))
            unsaved = goes_on(trainer) and any(one.lacks(step + 1, last) for one in best)
            return _is_logged(trainer, step) and "train_loss" not in last, "val_loss" not in last or unsaved
    return False, False


@rank_zero_only
def _take_up(trainer: L.Trainer, last: dict[str, float], unlogged: bool, unvalidated: bool) -> None:
    """Has the loggers go on after the last step, and logs it where it was not logged.

    TensorBoard is told of a step before ``metrics.csv`` is. Of a step that the latter does not have in full, the former
    may have anything, so that all of it is logged anew in both.
    """
    step = trainer.global_step - 1
    again = unlogged or unvalidated
    for folder, _ in csv_folders(trainer):
        cut_rows(folder / METRICS, step if again else step + 1)
    _mark_start(trainer, step if again else step + 1)
    for logger in trainer.loggers:
        is_cut = again and goes_on(trainer) and isinstance(logger, CSVLogger | TensorBoardLogger)
        if unlogged or (is_cut and _is_logged(trainer, step)):
            logger.log_metrics(last, step)
            logger.save()


@rank_zero_only
def _mark_start(trainer: L.Trainer, step: int) -> None:
    """Has TensorBoard show of earlier starts only what came before a step, as ``purge_step`` of its writers does.

    Its reader takes the first such mark in a folder for the beginning of it, so that a new run leaves one, too.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and (trainer.global_step or _is_alone(logger)):
            mark = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment._get_file_writer().add_event(mark)


def _is_alone(logger: TensorBoardLogger) -> bool:
    """Whether nothing but this start has written events into a folder, whose figures a mark would hide."""
    logger.save()  # which makes its file
    return len([*Path(logger.log_dir).glob("events.out.tfevents.*")]) == 1


def _is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether the trainer logs a step, counted from 0."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (step + 1) % every == 0


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


def _validate(trainer: Any, epoch: int) -> None:
    """Validates as Lightning does after a step of an epoch, which may have been the last one of it."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first, epochs = connector._first_loop_iter, trainer.fit_loop.epoch_progress.current
    now, epochs.completed = epochs.completed, epoch  # which is what Lightning logs
    loop.restarting, trainer.validating = False, True
    loop.run()
    trainer.training, connector._first_loop_iter, epochs.completed = True, first, now
