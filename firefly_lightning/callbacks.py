"""Callbacks of every run: checkpoints, throughput, the loss curve, the counts of the data."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, from which ``--ckpt_path last`` resumes.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        dirpath: Folder; ``checkpoints`` under ``trainer.default_root_dir`` by default.
    """

    def __init__(self, every_n_steps: int = 1000, dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, every_n_train_steps=every_n_steps, save_top_k=0, save_last=True)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the lowest validation loss.

    Args:
        monitor: What is compared.
        mode: Whether the lowest (``min``) or the highest (``max``) is best.
        save_top_k: How many are kept.
        dirpath: Folder; ``checkpoints`` under ``trainer.default_root_dir`` by default.
    """

    def __init__(
        self, monitor: str = "val_loss", mode: str = "min", save_top_k: int = 1, dirpath: str | None = None
    ) -> None:
        filename = f"best-step={{step}}-{monitor}={{{monitor}:.4f}}"
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )


class Throughput(Callback):
    """Logs ``target_tokens_per_second``: learned tokens of a step, over all ranks, by the time since the last step."""

    def __init__(self) -> None:
        self._since: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when the micro-batch was the last of its step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or self._since is None:
            return
        now = time.perf_counter()
        pl_module.log("target_tokens_per_second", batch["step_target_tokens"] / (now - self._since), prog_bar=True)
        self._since = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again: validation is not training time."""
        self._since = time.perf_counter()
