"""Watches the optimizer steps of a training: logs them, and ends the run before a bad step does harm."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from firefly_lightning.data.protocol import data_of
from firefly_lightning.errors import FireflyError
from firefly_lightning.optim.released import ReleasedGradients
from firefly_lightning.strategies.hooks import hooks_of

NAMED_ROWS = 32
"""How many rows a message about a bad step names at most; the published batch sizes are 16 and 8."""

_BEFORE = "still those before it"
_AFTER = "not to be trusted, the last checkpoint is"


class StepGuard:
    """Gathers the losses of a step's micro-batches, and checks and logs the step.

    A ``LightningModule`` holds one and calls it from its hooks, so that it works under any ``Trainer``, without a
    callback.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._figures: list[Mapping[str, Tensor]] = []
        self._step, self._loss = 0, 0.0
        self._released: ReleasedGradients | None = None

    def release(self, optimizer: Optimizer) -> None:
        """Has each weight updated as its gradient arrives, from now on; no norm can be checked before, only the loss.

        Args:
            optimizer: The optimizer of the run.
        """
        if self._released:
            self._released.stop()
        self._released = ReleasedGradients(optimizer)

    def add(self, module: L.LightningModule, loss: Tensor, figures: Mapping[str, Tensor] | None = None) -> None:
        """Notes the loss of a micro-batch.

        Args:
            module: The module that trains.
            loss: Scaled so that the mean of all micro-batches of all ranks is the loss of the step.
            figures: Further numbers by name, scaled in the same way; that of the step is logged as ``train_NAME``.

        Raises:
            FireflyError: If the loss is not finite and its backward pass would touch the weights.
        """
        self._losses.append(loss.detach())
        self._figures.append(figures or {})
        if self._released:
            self._step, self._loss = module.global_step, float(loss.detach())
            self._check(module, grad_norm=0.0, weights=_BEFORE)

    def forget(self) -> None:
        """Forgets the losses of a step that was begun and will not be finished."""
        self._losses.clear()
        self._figures.clear()

    def before_step(self, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Logs the loss of the step, the learning rate and, where it is known, the gradient's norm before clipping.

        Args:
            module: The module whose hook calls this; the values are logged by it.
            optimizer: The optimizer that is about to step.

        Raises:
            FireflyError: If loss or gradient is not finite. The message names the rows of the step; the weights are
                untouched then, unless gradients are released, which have updated weights as they came.
        """
        trainer: Any = module.trainer
        strategy = trainer.strategy
        if strategy.handles_gradient_accumulation and len(self._losses) < trainer.accumulate_grad_batches:
            return  # Lightning asks such an engine to step after each micro-batch; it knows which is last
        names = [*self._figures[0]]
        gathered = [self._losses, *([one[name] for one in self._figures] for name in names)]
        means = strategy.reduce(torch.stack([torch.stack(one).mean() for one in gathered]), reduce_op="mean")
        loss, *figures = means.unbind()
        self.forget()
        self._step, self._loss = module.global_step, float(loss.detach())
        module.log("train_loss", loss, prog_bar=True)
        for name, figure in zip(names, figures, strict=True):
            module.log(f"train_{name}", figure)
        module.log("lr", torch.tensor(float(optimizer.param_groups[0]["lr"]), dtype=torch.float64))
        if hooks_of(strategy).norm_follows_step:
            self._check(module, grad_norm=0.0, weights=_BEFORE)
        else:
            self._log_norm(module, weights=_AFTER if self._released else _BEFORE)

    def after_micro_batch(self, module: L.LightningModule) -> None:
        """Logs the gradient's norm after the last micro-batch of a step, where the engine computes it in its step.

        Raises:
            FireflyError: If the norm is not finite.
        """
        if hooks_of(module.trainer.strategy).norm_follows_step and not self._losses:
            self._log_norm(module, weights=_AFTER)

    def _log_norm(self, module: L.LightningModule, weights: str) -> None:
        of_strategy = hooks_of(module.trainer.strategy).gradient_norm
        norm = self._released.norm() if self._released else of_strategy(module.parameters())
        self._check(module, float(norm), weights)
        module.log("grad_norm", norm)

    def _check(self, module: L.LightningModule, grad_norm: float, weights: str) -> None:
        # A gradient scaler skips steps whose gradients overflow; without one nothing else would stop them.
        scaled = module.trainer.precision == "16-mixed"
        if math.isfinite(self._loss if scaled else self._loss + grad_norm):
            return
        data = data_of(module.trainer)
        rows = data.describe_step(self._step) if data else []
        raise FireflyError(
            f"step {self._step}: loss {self._loss}, gradient norm {grad_norm}; the weights are {weights}. "
            f"Look at its rows, or lower the learning rate. Rows: {_shown(rows)}"
        )


def _shown(rows: list[str]) -> str:
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return ", ".join(rows[:NAMED_ROWS]) + more if rows else "not known"
