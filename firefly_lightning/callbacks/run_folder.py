"""The folder of a run, in which its metrics, configuration, report and predictions lie together."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger

_OF_A_START = ("config.yaml", "hparams.yaml", "events.out.tfevents.")
"""Beginnings of the names of files that a run writes before it has measured anything."""


def csv_loggers(trainer: L.Trainer) -> list[CSVLogger]:
    """Those of a trainer's loggers that write ``metrics.csv``."""
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def csv_folders(trainer: L.Trainer) -> list[tuple[Path, str]]:
    """Folder of each ``metrics.csv`` of a run, and what stands before the names of metrics in it."""
    return [(Path(one.log_dir), f"{one._prefix}-" if one._prefix else "") for one in csv_loggers(trainer)]


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of ``metrics.csv``, or else of the first logger or the trainer; all processes call this together."""
    loggers = csv_loggers(trainer)
    folder = trainer.strategy.broadcast(loggers[0].log_dir) if loggers else trainer.log_dir
    return Path(folder or trainer.default_root_dir)  # a logger that writes into a database has no folder


def missing_folders(trainer: L.Trainer) -> list[Path]:
    """Folders that a run is going to make for its metrics, the inner ones first; none in any process but the first."""
    folders = [folder for folder, _ in csv_folders(trainer)] if trainer.is_global_zero else []
    return [each for folder in folders for each in (folder, *folder.parents) if not each.exists()]


def remove_unmeasured(folders: Iterable[Path]) -> None:
    """Removes folders of a run that has ended before it measured anything.

    Args:
        folders: What :func:`missing_folders` gave; one that holds anything else stays.
    """
    for folder in folders:
        if folder.is_dir() and all(path.name.startswith(_OF_A_START) for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
