"""What a run leaves for people to read: loss.png, kinds.png or pairs.png, and report.md beside its metrics.csv."""

import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.table import Table

from firefly_lightning.callbacks.run_figures import (
    Metrics,
    draw_kinds,
    draw_losses,
    draw_pairs,
    kind_perplexities,
    read_metrics,
)
from firefly_lightning.callbacks.run_folder import csv_folders, csv_loggers
from firefly_lightning.callbacks.run_history import PACKAGES, installed
from firefly_lightning.console import markdown, render
from firefly_lightning.data.counts_table import row_summary
from firefly_lightning.data.protocol import data_of
from firefly_lightning.evaluation.result_tables import filled_table, last_values, shown
from firefly_lightning.files.atomic import new_file

SPEED = ("target_tokens_per_second", "data_wait", "memory_gb", "mfu")
"""Metrics that are logged of every step; the report gives the median of each."""

OF_PAIRS = ("train_reward_accuracy", "train_reward_margin")
"""Metrics of a preference training of which the report gives the first and the last."""


class Report(Callback):
    """Writes the report of a training, a validation or a test that logs to CSV, and draws the figures of a training.

    The results of a validation or a test are printed too.

    Args:
        prints: Whether results are printed.
    """

    def __init__(self, prints: bool = True) -> None:
        self.prints = prints

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the figures and writes the report."""
        for folder, metrics in _logged(trainer):
            draw_losses(metrics, folder / "loss.png")
            if perplexities := kind_perplexities(metrics):
                draw_kinds(perplexities, folder / "kinds.png")
            if "train_reward_accuracy" in metrics:
                draw_pairs(metrics, folder / "pairs.png")
            _write(
                folder, trainer, [*training_results(metrics), *last_values(metrics, "val", _rows_of(trainer, "val"))]
            )

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints and writes the results of a validation that is no part of a training."""
        if trainer.state.fn == "validate":
            self._show_evaluation(trainer, pl_module, "val")

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints and writes the results of a test."""
        self._show_evaluation(trainer, pl_module, "test")

    def _show_evaluation(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        rows = _rows_of(trainer, stage)
        if self.prints:  # what was logged, since there may be no logger of files
            values = {name: {0: float(value)} for name, value in sorted(trainer.callback_metrics.items())}
            pl_module.print("\n".join(map(render, last_values(values, stage, rows))))
        for folder, metrics in _logged(trainer):
            _write(folder, trainer, last_values(metrics, stage, rows))


def training_results(metrics: Metrics) -> Iterator[Table]:
    """The losses and the speed of a training, as a table; nothing where no step was logged.

    Steps count from 1, as in the names of checkpoints; rows of ``metrics.csv`` count from 0.
    """
    losses, validated = metrics["train_loss"], metrics.get("val_loss", {})
    if not losses:
        return
    first, last = min(losses), max(losses)
    ends = f"{losses[first]:.4f}, {losses[last]:.4f}"
    rows = [("steps", f"{len(losses):,}"), ("training loss, first and last", ends)]
    if validated:
        best = min(validated, key=lambda step: validated[step])
        rows.append(("lowest validation loss", f"{validated[best]:.4f} at step {best + 1:,}"))
    for name in (name for name in OF_PAIRS if metrics.get(name)):
        values = metrics[name]
        ends = f"{shown(values[min(values)])}, {shown(values[max(values)])}"
        rows.append((f"{name.removeprefix('train_').replace('_', ' ')} in training, first and last", ends))
    rows += [(f"{name}, median", shown(median(metrics[name].values()))) for name in SPEED if metrics.get(name)]
    yield filled_table(("training", ""), rows)


def _rows_of(trainer: L.Trainer, stage: str) -> dict[str, int]:
    """Number of rows of each kind that a stage evaluates; nothing where the data is not this project's."""
    data = data_of(trainer)
    batches = {"val": data.val, "test": data.test}[stage] if data else None
    return batches.count_kinds() if batches else {}


def _write(folder: Path, trainer: L.Trainer, results: Iterable[Table]) -> None:
    figures = [f"![{name}]({name})\n" for name in ("loss.png", "kinds.png", "pairs.png") if (folder / name).is_file()]
    configuration = folder / "config.yaml"
    parts = [
        f"# {folder.name}\n",
        "## Results\n",
        *(f"{markdown(table)}\n" for table in results),
        *figures,
        *(["## Data\n", *(f"{table}\n" for table in counts)] if (counts := [*_counts(trainer)]) else []),
        "## Versions\n",
        f"{markdown(filled_table(('', ''), _versions(trainer)))}\n",
        *_section("Configuration", "yaml", configuration.read_text("utf-8") if configuration.is_file() else ""),
    ]
    with new_file(folder / "report.md", []) as file:
        file.write("\n".join(parts).encode())


def _counts(trainer: L.Trainer) -> Iterator[str]:
    """Tables that count the rows of each part of the data, where the data is this project's.

    Rows held out for validation are counted in the table of the training rows.
    """
    data = data_of(trainer)
    parts = (data.train, data.val, data.test) if data else ()
    for rows in {id(part.rows): part.rows for part in parts if part is not None}.values():
        yield row_summary(rows, markdown)


def _versions(trainer: L.Trainer) -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield from installed(PACKAGES).items()
    device = trainer.strategy.root_device
    yield "device", torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    yield "processes", str(trainer.world_size)
    yield "strategy", type(trainer.strategy).__name__
    yield "precision", str(trainer.precision)


def _section(title: str, language: str, text: str) -> list[str]:
    return [f"## {title}\n", f"```{language}\n{text.strip()}\n```\n"] if text else []


def _logged(trainer: L.Trainer) -> Iterator[tuple[Path, Metrics]]:
    """Folder and metrics of each of the run's CSV loggers; a line says so where there is none."""
    loggers = csv_loggers(trainer)
    if not loggers and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of the trainer
        rank_zero_info("no report.md and no figures: they are made of metrics.csv, and trainer.logger has no CSVLogger")
    for logger, (folder, prefix) in zip(loggers, csv_folders(trainer), strict=True):
        logger.save()
        yield folder, read_metrics(folder, prefix)
