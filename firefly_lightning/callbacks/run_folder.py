"""The folder of a run, in which its metrics, configuration, report and predictions lie together."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger


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
