"""The loggers of a run. A run that goes on from its last checkpoint writes on where the run before it has written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from firefly_lightning.callbacks.metrics_file import METRICS, MetricsFile
from firefly_lightning.callbacks.run_figures import keep_metrics, read_csv
from firefly_lightning.callbacks.run_folder import csv_loggers
from firefly_lightning.checkpoints.layout import LAST_STEP_KEY, RUN_KEY


def csv_logger(root: str | None) -> CSVLogger:
    """A CSV logger that writes after every step, so that a killed run keeps its figures."""
    return CSVLogger(root or str(Path.cwd()), flush_logs_every_n_steps=1)


def default_loggers(root: str | None) -> list[Logger]:
    """TensorBoard, and a CSV logger.

    They are called in this order, so that what ``metrics.csv`` has TensorBoard has, too, whenever a run is killed.
    """
    csv = csv_logger(root)
    return [TensorBoardLogger(csv.save_dir, csv.name), csv]


def versions(loggers: Sequence[Logger]) -> list[list[Any]]:
    """Of each logger that writes files under a version: the name of its class, and the version."""
    return [[type(one).__name__, one.version] for one in loggers if isinstance(one, CSVLogger | TensorBoardLogger)]


def go_on(loggers: Sequence[Logger], saved: Mapping[str, Any], every: int) -> bool:
    """Has loggers write where those of the run have that saved a checkpoint, if their figures are there.

    The checkpoint may have come from another folder, where versions have the same numbers.

    Args:
        loggers: Loggers of a run that has not begun.
        saved: What Lightning saved of the run that is resumed.
        every: Number of steps between two that are logged.

    Returns:
        Whether they do; if not, they make a version of their own.
    """
    ours: list[Any] = [one for one in loggers if isinstance(one, CSVLogger | TensorBoardLogger)]
    theirs = saved.get(RUN_KEY, {}).get("logs", [])
    if [type(one).__name__ for one in ours] != [name for name, _ in theirs]:
        return False
    pairs = [(one, version) for one, (_, version) in zip(ours, theirs, strict=True)]
    named = all(one._version in (None, version) for one, version in pairs)
    tables = [(one, version) for one, version in pairs if isinstance(one, CSVLogger)]
    if not (named and tables and all(_has_figures(one, version, saved, every) for one, version in tables)):
        return False
    for one, version in pairs:
        one._version = version
    return True


def take_files(trainer: L.Trainer, goes_on: bool) -> None:
    """Has loggers of files write where nothing is lost, neither what is there nor what a kill would cost.

    Args:
        trainer: The trainer, before it runs anything.
        goes_on: Whether what is there is of the run that goes on.
    """
    for logger in csv_loggers(trainer):
        for other in trainer.loggers:
            if isinstance(other, TensorBoardLogger) and other._version is None and other.root_dir == logger.root_dir:
                other._version = logger.version
        if not goes_on:
            keep_metrics(Path(logger.log_dir))
        if trainer.is_global_zero and logger._experiment is None:
            logger._experiment = MetricsFile(logger.log_dir)  # type: ignore[assignment]


def _has_figures(logger: Any, version: Any, saved: Mapping[str, Any], every: int) -> bool:
    """Whether the metrics of a version are those of the run that saved a checkpoint, up to its last step."""
    folder = Path(logger.root_dir) / (version if isinstance(version, str) else f"version_{version}")
    last, known = saved.get("global_step", 0) - 1, (saved.get(LAST_STEP_KEY) or {}).get("train_loss")
    losses = read_csv(folder / METRICS, f"{logger._prefix}-" if logger._prefix else "").get("train_loss", {})
    if last in losses:
        return losses[last] == known
    return folder.is_dir() and max((step for step in losses if step < last), default=-1) >= last - every
