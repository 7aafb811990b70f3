"""The learning rate over a run, and the settings of an optimizer in a run that is resumed.

A resumed run takes an optimizer's settings from its configuration, and from the checkpoint the optimizer's progress and
what a schedule has changed in the settings: the learning rate, and with some schedules momenta.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
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


def check_counts_steps(schedule: Any) -> None:
    """Refuses a schedule that follows a metric, since no checkpoint tells when the metric was last seen.

    Args:
        schedule: A schedule, or None for the one of this module.

    Raises:
        FireflyError: If a step of the schedule needs a metric, as that of ``ReduceLROnPlateau`` does.
    """
    if schedule is not None and "metrics" in inspect.signature(schedule.step).parameters:
        raise FireflyError(
            f"model.lr_scheduler: {type(schedule).__name__} follows a metric, and a resumed run could not go on as if "
            "it had not stopped; take a schedule that counts steps, such as torch.optim.lr_scheduler.CosineAnnealingLR"
        )


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

    def changed(self, optimizer: Any) -> dict[str, list[Any]]:
        """Settings that no longer are as configured, since a schedule has changed them: for each its value by group."""
        names = {
            name
            for group, settings in zip(optimizer.param_groups, self.groups, strict=False)
            for name, value in settings.items()
            if group.get(name, value) is not value and bool(group[name] != value)
        }
        return {name: [group.get(name) for group in optimizer.param_groups] for name in sorted(names)}

    def apply(self, optimizer: Any, scheduler: Any, changed: Mapping[str, list[Any]]) -> None:
        """Restores these settings after a checkpoint was loaded; the learning rate follows from the step reached.

        Args:
            optimizer: The optimizer, also an engine's.
            scheduler: Its schedule, or None.
            changed: What :meth:`changed` gave when the checkpoint was saved.

        Raises:
            FireflyError: If the checkpoint's schedule is of another number of groups of weights.
        """
        for number, (group, settings) in enumerate(zip(optimizer.param_groups, self.groups, strict=True)):
            group.update(settings)
            group.update({name: values[number] for name, values in changed.items() if number < len(values)})
        if isinstance(scheduler, LRScheduler):
            rates = self._reached(scheduler)
            if len(rates) != len(self.groups) or len(getattr(scheduler, "base_lrs", rates)) != len(self.groups):
                raise FireflyError(
                    f"the checkpoint's {type(scheduler).__name__} has rates of {len(rates)} groups of weights, the "
                    f"optimizer has {len(self.groups)}; use an earlier checkpoint, or the optimizer that saved it"
                )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = list(rates)
        elif getattr(scheduler, "last_batch_iteration", -1) >= 0:  # DeepSpeed's own set rates and momenta of a step
            scheduler.step(scheduler.last_batch_iteration)

    def _reached(self, scheduler: LRScheduler) -> Sequence[Any]:
        """Learning rates at the step that a schedule has reached; its base rates become those configured."""
        saved, base = getattr(scheduler, "base_lrs", None), self.base_lrs
        rates: list[Any] = scheduler._last_lr
        if saved is None or base is None or len(saved) != len(base):
            return rates
        scheduler.base_lrs = list(base)
        if type(scheduler).get_lr is LambdaLR.get_lr:
            lambdas: list[Any] = scheduler.lr_lambdas  # type: ignore[attr-defined]
            factors = [factor(scheduler.last_epoch) for factor in lambdas]
            return [rate * factor for rate, factor in zip(base, factors, strict=True)]
        # Other schedules go on from their last rate, scaled by the ratio of the configured to the saved base rate.
        return [rate * (new / old if old else 1.0) for rate, new, old in zip(rates, base, saved, strict=True)]


class RunSettings:
    """Carries the settings of a run's optimizers through a resume; a ``LightningModule`` holds one."""

    def __init__(self) -> None:
        self._configured: list[OptimizerSettings] = []
        self._changed: list[dict[str, list[Any]]] | None = None

    def note(self, trainer: Any) -> None:
        """Notes the settings as configured, before a checkpoint's are loaded."""
        self._configured = [OptimizerSettings.of(*each) for each in optimizers_with_schedules(trainer)]

    def changed(self, trainer: Any) -> list[dict[str, list[Any]]]:
        """For each optimizer, the settings that schedules have changed, to be saved."""
        pairs = zip(self._configured, trainer.optimizers, strict=False)
        return [settings.changed(optimizer) for settings, optimizer in pairs]

    def resume(self, changed: list[dict[str, list[Any]]]) -> None:
        """Takes what :meth:`changed` gave from a checkpoint; empty where the checkpoint does not have it."""
        self._changed = changed

    def restore(self, trainer: Any) -> None:
        """Restores the settings, once, after a checkpoint was loaded; without one it leaves them alone."""
        if self._changed is not None:
            pairs = zip(self._configured, optimizers_with_schedules(trainer), strict=True)
            for number, (settings, each) in enumerate(pairs):
                settings.apply(*each, self._changed[number] if number < len(self._changed) else {})
            self._changed = None
