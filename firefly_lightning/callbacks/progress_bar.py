"""Lightning's rich progress bar over a whole run, with the metrics that tell whether the run goes well."""

import logging
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    RichProgressBarTheme,
)
from rich.progress import TextColumn, TimeElapsedColumn
from typing_extensions import override

SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "train_loss": ("loss", "{:.3f}".format),
    "val_loss": ("val", "{:.3f}".format),
    "lr": ("lr", "{:.1e}".format),
    "target_tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "data_wait": ("wait", "{:.0%}".format),
    "memory_gb": ("memory", "{:.1f} GB".format),
    "mfu": ("MFU", "{:.0%}".format),
}
"""What the bar calls each metric and how it writes its value, by the name that the metric is logged by."""

FIRST = ("loss", "left", "val", "lr", "tokens/s", "MFU", "memory", "wait")
"""What the bar shows where a line has no room for all, the most important first."""


class RunProgressBar(RichProgressBar):
    """Counts the optimizer steps of the run, not the micro-batches of an epoch, and says how long the rest takes."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, theme=RichProgressBarTheme(metrics_text_delimiter=" · "))
        self._started, self._first_step = 0.0, 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._update(self.train_progress_bar_id, trainer.global_step)
            self._update_metrics(trainer, pl_module)

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        logged = trainer.callback_metrics
        shown = {name: form(float(logged[key])) for key, (name, form) in SHOWN.items() if key in logged}
        left = self.seconds_left(trainer)
        return self._fitting(shown if left is None else {**shown, "left": str(timedelta(seconds=round(left)))})

    def _fitting(self, shown: dict[str, str]) -> dict[str, str]:
        """What fits into a line beside the bar: a bar of two lines would leave one of them behind."""
        steps = len(f"{self._total_steps:.0f}")
        room = self._width - len("Training  0:00:00  ") - self._bar_width - 2 * steps - 3
        kept = []
        for name in sorted(shown, key=FIRST.index):
            room -= len(f"{name}: {shown[name]} · ")
            if room >= -len(" · "):
                kept.append(name)
        return {name: value for name, value in shown.items() if name in kept}

    def seconds_left(self, trainer: L.Trainer) -> float | None:
        """Seconds until the run ends, by the mean of the steps so far, validations included.

        None before the first step is done, or where the run has no last step.
        """
        done, left = trainer.global_step - self._first_step, self._total_steps - trainer.global_step
        known = done > 0 and left < float("inf")
        return (time.monotonic() - self._started) / done * left if known else None

    @override
    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        bar = CustomBarColumn(
            bar_width=self._bar_width,
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        steps = BatchesProcessedColumn(style=self.theme.batch_progress)
        return [TextColumn("{task.description}"), bar, steps, TimeElapsedColumn()]

    @property
    def _width(self) -> int:
        """Characters of a line of the terminal."""
        return self._console.width if self._console else 80

    @property
    def _bar_width(self) -> int:
        """Characters of the bar itself, which leaves room for figures in a narrow terminal."""
        return 20 if self._width >= 120 else 10

    @property
    def _total_steps(self) -> float:
        return float(self.trainer.estimated_stepping_batches)

    def _initialize_train_progress_bar_id(self) -> None:
        total = self._total_steps
        self.train_progress_bar_id = self._add_task(total if math.isinf(total) else int(total), "Training")
        self._update(self.train_progress_bar_id, self.trainer.global_step)


def spare_bars(*loggers: str) -> None:
    """Has loggers write to what ``sys.stderr`` is at the time, in place of which a bar puts what writes above it.

    Otherwise their lines begin where the bar ends.
    """
    for name in loggers:
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__:
                handler.__class__ = _ToStderr


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]  # generic in stubs only
    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        """Does nothing: the stream is looked up each time."""
