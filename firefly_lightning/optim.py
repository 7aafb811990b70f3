"""The learning rate over a run, and which settings of an optimizer hold in one that is resumed.

An optimizer's settings are the configuration's, its progress the checkpoint's.
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
    """Factor of the learning rate: up from 0 in a line, then down to 0 along half a cosine.

    The same as that of transformers' ``get_cosine_schedule_with_warmup``, whose module imports peft and bitsandbytes
    where they are installed, a fifth of the time that a start takes.

    Args:
        step: Optimizer steps that were taken.
        warmup: Steps of the way up.
        steps: All of them.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.
    """
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def cosine_schedule(optimizer: Optimizer, warmup: int, steps: float) -> LambdaLR:
    """A schedule by :func:`cosine_with_warmup`.

    Args:
        optimizer: Whose rate it sets.
        warmup: Steps of the way up.
        steps: All of the run; infinite where it has no last one.

    Raises:
        FireflyError: If there is no last step for the cosine to end at.
    """
    if steps == math.inf:
        raise FireflyError("the cosine needs a last step; set trainer.max_steps or trainer.max_epochs")
    return LambdaLR(optimizer, partial(cosine_with_warmup, warmup=warmup, steps=int(steps)))


def optimizers_with_schedules(trainer: Any) -> list[tuple[Any, Any]]:
    """Each of a trainer's optimizers with its schedule, or None."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return list(zip_longest(trainer.optimizers, schedules[: len(trainer.optimizers)]))


@dataclass(frozen=True)
class OptimizerSettings:
    """Of one optimizer and its schedule, as the configuration has them."""

    groups: list[dict[str, Any]]
    base_lrs: list[float] | None

    @classmethod
    def of(cls, optimizer: Any, scheduler: Any) -> "OptimizerSettings":
        """Those of an optimizer, also an engine's, and of its schedule or None, before a checkpoint is loaded."""
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        base_lrs = getattr(scheduler, "base_lrs", None)
        return cls(groups, list(base_lrs) if base_lrs is not None else None)

    def apply(self, optimizer: Any, scheduler: Any) -> None:
        """Sets them where a checkpoint has been loaded; the learning rate follows from the step that was reached."""
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        if isinstance(scheduler, LRScheduler):
            rates = self._reached(scheduler)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = list(rates)

    def _reached(self, scheduler: LRScheduler) -> Sequence[Any]:
        """Learning rates at the step of a schedule, whose base becomes that of the configuration."""
        saved, base = getattr(scheduler, "base_lrs", None), self.base_lrs
        rates: list[Any] = scheduler._last_lr
        if saved is None or base is None or len(saved) != len(base):
            return rates
        scheduler.base_lrs = list(base)
        if isinstance(scheduler, LambdaLR):
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            return [rate * factor for rate, factor in zip(base, factors, strict=True)]
        # Others go on from the rate that they last had; one that starts elsewhere is that much higher or lower.
        return [rate * (new / old if old else 1.0) for rate, new, old in zip(rates, base, saved, strict=True)]
