"""The learning rate over a run, and the settings of an optimizer in a run that is resumed.

A resumed run takes an optimizer's settings from its configuration, and the optimizer's progress from the checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from firefly_lightning.errors import FireflyError


def cosine_with_warmup(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate: it rises linearly from 0 to 1, then falls to 0 along half a cosine.

    The factor equals that of transformers' ``get_cosine_schedule_with_warmup``. That function is not used, since its
    module imports peft and bitsandbytes where they are installed, which is a fifth of the time that a start takes.

    Args:
        step: Optimizer steps taken so far.
        warmup: Optimizer steps in which the factor rises.
        steps: Optimizer steps of the whole run.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.
    """
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def cosine_schedule(optimizer: Optimizer, warmup: int, steps: float) -> LambdaLR:
    """A schedule whose learning rate follows :func:`cosine_with_warmup`.

    Args:
        optimizer: Optimizer whose learning rate is set.
        warmup: Optimizer steps in which the learning rate rises.
        steps: Optimizer steps of the whole run; infinite where the run has no last step.

    Raises:
        FireflyError: If there is no last step for the cosine to end at.
    """
    if steps == math.inf:
        raise FireflyError("the cosine needs a last step; set trainer.max_steps or trainer.max_epochs")
    return LambdaLR(optimizer, partial(cosine_with_warmup, warmup=warmup, steps=int(steps)))


def optimizers_with_schedules(trainer: Any) -> list[tuple[Any, Any]]:
    """Each of a trainer's optimizers with its schedule, or with None where it has no schedule."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return list(zip_longest(trainer.optimizers, schedules[: len(trainer.optimizers)]))


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of one optimizer and its schedule, as the configuration gives them."""

    groups: list[dict[str, Any]]
    base_lrs: list[float] | None

    @classmethod
    def of(cls, optimizer: Any, scheduler: Any) -> "OptimizerSettings":
        """Settings of an optimizer, also of an engine's, and of its schedule or None, before a checkpoint is loaded."""
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        base_lrs = getattr(scheduler, "base_lrs", None)
        return cls(groups, list(base_lrs) if base_lrs is not None else None)

    def apply(self, optimizer: Any, scheduler: Any) -> None:
        """Restores these settings after a checkpoint was loaded; the learning rate follows from the step reached."""
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        if isinstance(scheduler, LRScheduler):
            rates = self._reached(scheduler)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = list(rates)

    def _reached(self, scheduler: LRScheduler) -> Sequence[Any]:
        """Learning rates at the step that a schedule has reached; its base rates become those configured."""
        saved, base = getattr(scheduler, "base_lrs", None), self.base_lrs
        rates: list[Any] = scheduler._last_lr
        if saved is None or base is None or len(saved) != len(base):
            return rates
        scheduler.base_lrs = list(base)
        if isinstance(scheduler, LambdaLR):
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            return [rate * factor for rate, factor in zip(base, factors, strict=True)]
        # Other schedules go on from their last rate, scaled by the ratio of the configured to the saved base rate.
        return [rate * (new / old if old else 1.0) for rate, new, old in zip(rates, base, saved, strict=True)]
