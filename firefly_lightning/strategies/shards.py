"""Checkpoints that an engine writes in parts: a folder, whole or absent, which the same strategy reads again."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from firefly_lightning.checkpoint import TRAINER_FILE, load_file, partial_folder, partial_path, replace
from firefly_lightning.errors import FireflyError

WRITER_KEY = "written_by"
"""Where ``trainer.ckpt`` says which strategy wrote the folder, and on how many processes."""


class ShardedCheckpoints(Strategy):
    """Mixed into a strategy whose engine saves weights and optimizer states itself, every process its part."""

    @abstractmethod
    def save_shards(self, folder: Path) -> None:
        """Writes weights and, while fitting, optimizer states; called by all processes with the same folder."""

    @abstractmethod
    def load_shards(self, folder: Path, fitting: bool) -> None:
        """Reads what :meth:`save_shards` wrote, optimizer states only if ``fitting``; called by all processes."""

    @abstractmethod
    def writer(self) -> dict[str, Any]:
        """What must be the same where the checkpoint is read: plain values by name."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Fills a hidden folder beside ``filepath``, then gives it that name."""
        target = Path(self.broadcast(str(filepath)))
        if self.is_global_zero:
            partial_folder(target)
        self.barrier()
        partial = partial_path(target)
        self.save_shards(partial)
        self.barrier()
        if self.is_global_zero:
            kept = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
            torch.save(kept | {WRITER_KEY: self.writer()}, partial / TRAINER_FILE)
            replace(partial, target)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what Lightning saved; the shards follow once hooks have seen that.

        Raises:
            FireflyError: If it is no such checkpoint, or that of another strategy or number of processes.
        """
        self._folder = Path(checkpoint_path)
        if not (self._folder / TRAINER_FILE).is_file():
            raise FireflyError(f"{checkpoint_path}: was not saved by this strategy; resume with the one that saved it")
        checkpoint = load_file(self._folder / TRAINER_FILE, "cpu")
        saved, now = checkpoint.get(WRITER_KEY, {}), self.writer()
        changed = [f"{name} {saved.get(name)} → {now[name]}" for name in now if saved.get(name) != now[name]]
        if changed:
            raise FireflyError(f"{checkpoint_path}: was saved otherwise ({', '.join(changed)}); resume as it was saved")
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: Any = self.lightning_module
        self.load_shards(self._folder, module.trainer.state.fn == TrainerFn.FITTING)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Not: :meth:`load_shards` does."""
        return False

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: :meth:`save_shards` writes the weights."""
        return {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: :meth:`save_shards` writes it."""
        return {}

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True
