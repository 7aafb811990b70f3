"""How fast a run trains, and what it waits for."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs what every optimizer step took, over the time since the last one ended; validation is not in it.

    ``target_tokens_per_second`` counts the learned tokens of the step, over all ranks. ``data_wait`` is the share of
    that time which the training loop of this rank spent waiting for its next micro-batches, between 0 and 1; it is
    there where the loader says how long that was, as those of ``FireflyDataModule`` do.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._waited = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when the micro-batch was the last of its step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or self._since is None:
            return
        seconds = time.perf_counter() - self._since
        pl_module.log("target_tokens_per_second", batch["step_target_tokens"] / seconds)
        if (waited := _seconds_waited(trainer)) is not None:
            pl_module.log("data_wait", (waited - self._waited) / seconds)
        self._start(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again: validation is not training time."""
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self._since, self._waited = time.perf_counter(), _seconds_waited(trainer) or 0.0


def _seconds_waited(trainer: L.Trainer) -> float | None:
    return getattr(trainer.train_dataloader, "seconds_waited", None)
