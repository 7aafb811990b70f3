"""The settings of an optimizer in a run that is resumed.

A resumed run takes an optimizer's settings from its configuration, and from the checkpoint the optimizer's progress and
what a schedule has changed in the settings: the learning rate, and with some schedules momenta.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from firefly_lightning.errors import FireflyError


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
            {name: _own(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        base_lrs = getattr(scheduler, "base_lrs", None)
        return cls(groups, [_own(rate) for rate in base_lrs] if base_lrs is not None else None)

    def changed(self, optimizer: Any) -> dict[str, list[Any]]:
        """Settings that no longer are as configured, since a schedule has changed them: for each its value by group."""
        names = {
            name
            for group, settings in zip(optimizer.param_groups, self.groups, strict=False)
            for name, value in settings.items()
            if group.get(name, value) is not value and bool(group[name] != value)
        }
        return {name: [_own(group.get(name)) for group in optimizer.param_groups] for name in sorted(names)}

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
            group.update({name: _own(value) for name, value in settings.items()})
            for name, values in changed.items():  # of a checkpoint with another number of groups, the first one's
                group[name] = _own(values[number if len(values) == len(self.groups) else 0])
        if isinstance(scheduler, LRScheduler):
            rates = self._reached(scheduler)
            if len(rates) != len(self.groups) or len(getattr(scheduler, "base_lrs", rates)) != len(self.groups):
                raise FireflyError(
                    f"the checkpoint's {type(scheduler).__name__} has rates of {len(rates)} groups of weights, the "
                    f"optimizer has {len(self.groups)}; use an earlier checkpoint, or the optimizer that saved it"
                )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = _own(torch.as_tensor(rate).to(group["lr"])) if isinstance(group["lr"], Tensor) else rate
            scheduler._last_lr = [_own(rate) for rate in rates]
        elif getattr(scheduler, "last_batch_iteration", -1) >= 0:  # DeepSpeed's own set rates and momenta of a step
            scheduler.step(scheduler.last_batch_iteration)

    def _reached(self, scheduler: LRScheduler) -> Sequence[Any]:
        """Learning rates at the step that a schedule has reached; its base rates become those configured.

        Raises:
            FireflyError: If the checkpoint has another number of groups, and the schedule keeps more for each.
        """
        saved, base = getattr(scheduler, "base_lrs", None), self.base_lrs
        rates: list[Any] = scheduler._last_lr
        if base is not None and type(scheduler).get_lr is LambdaLR.get_lr:
            scheduler.base_lrs = list(base)
            lambdas: list[Any] = scheduler.lr_lambdas  # type: ignore[attr-defined]
            factors = [factor(scheduler.last_epoch) for factor in lambdas]
            return [rate * factor for rate, factor in zip(base, factors, strict=True)]
        if len(rates) != len(self.groups):
            raise FireflyError(
                f"the checkpoint has {len(rates)} groups of parameters, this run {len(self.groups)}, which "
                f"{type(scheduler).__name__} cannot follow; resume with the model.weight_decay it was saved with"
            )
        if saved is None or base is None or len(saved) != len(base):
            return rates
        scheduler.base_lrs = list(base)
        # Other schedules go on from their last rate, scaled by the ratio of the configured to the saved base rate.
        return [rate * (new / old if old else 1.0) for rate, new, old in zip(rates, base, saved, strict=True)]


class RunSettings:
    """Carries the settings of a run's optimizers through a resume; a ``LightningModule`` holds one."""

    def __init__(self) -> None:
        self._configured: list[OptimizerSettings] = []
        self._changed: list[dict[str, list[Any]]] | None = None
        self._schedules: list[dict[str, Any]] = []

    def note(self, trainer: Any) -> None:
        """Notes the settings as configured, before a checkpoint's are loaded."""
        self._configured = [OptimizerSettings.of(*each) for each in optimizers_with_schedules(trainer)]
        self._leave_out_groups()

    def changed(self, trainer: Any) -> list[dict[str, list[Any]]]:
        """For each optimizer, the settings that schedules have changed, to be saved."""
        pairs = zip(self._configured, trainer.optimizers, strict=False)
        return [settings.changed(optimizer) for settings, optimizer in pairs]

    def resume(self, changed: list[dict[str, list[Any]]], schedules: list[dict[str, Any]]) -> None:
        """Takes what a checkpoint has; called before or after :meth:`note`, as the strategy has it.

        Args:
            changed: What :meth:`changed` gave; empty where the checkpoint does not have it.
            schedules: States of the schedules, which are about to be loaded.
        """
        self._changed, self._schedules = changed, schedules
        self._leave_out_groups()

    def restore(self, trainer: Any) -> None:
        """Restores the settings, once, after a checkpoint was loaded; without one it leaves them alone."""
        if self._changed is not None:
            pairs = zip(self._configured, optimizers_with_schedules(trainer), strict=True)
            for number, (settings, each) in enumerate(pairs):
                settings.apply(*each, self._changed[number] if number < len(self._changed) else {})
            self._changed = None

    def _leave_out_groups(self) -> None:
        """Leaves functions out of schedules' states for groups that this run does not have."""
        for state, settings in zip(self._schedules, self._configured, strict=False):
            if isinstance(functions := state.get("lr_lambdas"), list):
                state["lr_lambdas"] = functions[: len(settings.groups)]


def _own(value: Any) -> Any:
    """The value, of a tensor a copy, since schedules change a rate that is a tensor in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value
