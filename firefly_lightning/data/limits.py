"""Has a trainer count whole optimizer steps and rows, where Lightning counts micro-batches of one device."""

import math
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from firefly_lightning.data.batches import PlannedBatches
from firefly_lightning.errors import FireflyError

_GIVEN = "_firefly_given"
"""Attribute of a trainer: by the name of a setting, its value as the user gave it, and the value that it was set to."""

_OF_STAGE = {
    "fit": "limit_val_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}


def count_steps(trainer: Any, train: PlannedBatches) -> None:
    """Sets a trainer's accumulation, and has its epochs, limits and validation intervals count optimizer steps.

    An epoch has as many steps as ``limit_train_batches`` or ``fast_dev_run`` says; step ``k`` has the rows that it has
    without a limit, so that the next epoch takes the rows that come next. With ``overfit_batches`` every epoch takes
    the rows of the first steps again.

    Args:
        trainer: A trainer that begins to train; its settings are read as the user gave them, however often it is set.
        train: The micro-batches to train on; their steps in an epoch, and with ``overfit_batches`` their plan, are set.

    Raises:
        FireflyError: If a setting contradicts the plan of steps, or leaves no step in an epoch.
    """
    per_step, plan = train.micro_batches_per_step, train.plan
    _check_accumulation(trainer, per_step)
    _put(trainer, "accumulate_grad_batches", per_step)
    name = _limit_of_epoch(trainer)
    steps = _steps_of_epoch(trainer, plan.steps_per_epoch)
    if not steps:
        raise FireflyError(f"trainer.{name} 0 leaves nothing to train on; to validate only, run firefly-fit validate")
    _put(trainer, "limit_train_batches", 1.0)  # the loader has no more than these steps
    train.steps_per_epoch = steps
    if name == "overfit_batches":
        train.plan = plan.repeated(steps)
    train.plan.check_lasts(int(last) if (last := last_step(trainer, steps)) < math.inf else 0)
    interval = _given(trainer, "val_check_interval")
    if isinstance(interval, float) and interval < 1:  # a share of an epoch, in whole steps
        interval = max(1, int(interval * steps))
    if isinstance(interval, int):
        _put(trainer, "val_check_interval", interval * per_step)


def steps_of_run(trainer: Any, steps_per_epoch: int) -> float:
    """Number of optimizer steps of a run; infinite where it has no last one. Without a trainer, those of an epoch.

    Args:
        trainer: The trainer, or None.
        steps_per_epoch: Number of optimizer steps of an epoch without limits.
    """
    return steps_per_epoch if trainer is None else last_step(trainer, _steps_of_epoch(trainer, steps_per_epoch))


def last_step(trainer: Any, steps_per_epoch: int) -> float:
    """Number of a run's last optimizer step; infinite where it has none.

    Args:
        trainer: The trainer, whose ``max_steps`` and ``max_epochs`` are read.
        steps_per_epoch: Number of optimizer steps that count as an epoch.
    """
    steps, epochs = getattr(trainer, "max_steps", -1), getattr(trainer, "max_epochs", None)
    if epochs is None and steps == -1:
        epochs = 1000  # Lightning's own default
    by_epochs = math.inf if epochs in (None, -1) else epochs * steps_per_epoch
    return min(by_epochs, math.inf if steps == -1 else steps)


def limited_rows(trainer: Any, stage: str, rows: int, batch_size: int) -> int:
    """How many of its rows an evaluation takes: an int limits batches of ``batch_size`` rows, a float the rows.

    Args:
        trainer: The trainer, or None.
        stage: Lightning's name of what the trainer does; the limit is that of its evaluation.
        rows: Number of all rows.
        batch_size: Rows of a batch, over all devices and micro-batches.

    Raises:
        FireflyError: If the limit leaves no row.
    """
    name = _OF_STAGE[stage]
    limit = _given(trainer, name)
    if limit == 0:  # Lightning then leaves the evaluation out
        return rows
    if trainer is not None:
        _put(trainer, name, 1.0)
    return _limited(name, limit * batch_size if isinstance(limit, int) else limit, rows, "rows")


def _check_accumulation(trainer: Any, per_step: int) -> None:
    accumulated = _given(trainer, "accumulate_grad_batches")
    if accumulated not in (1, per_step):
        raise FireflyError(
            f"trainer.accumulate_grad_batches {accumulated} disagrees with data.batch_size: "
            f"{per_step} micro-batches make a step here; leave it out and set data.micro_batch_size"
        )
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, GradientAccumulationScheduler) and {*callback.scheduling.values(), per_step} != {1}:
            raise FireflyError(
                "trainer.callbacks: GradientAccumulationScheduler would change the rows of a step from epoch to epoch, "
                "and data.batch_size says how many there are; leave it out and set data.batch_size"
            )


def _limit_of_epoch(trainer: Any) -> str:
    return "overfit_batches" if getattr(trainer, "overfit_batches", 0) else "limit_train_batches"


def _steps_of_epoch(trainer: Any, steps_per_epoch: int) -> int:
    limit = _given(trainer, "limit_train_batches")
    return _limited(_limit_of_epoch(trainer), limit, steps_per_epoch, "steps of an epoch")


def _limited(name: str, limit: Any, count: int, of: str) -> int:
    """How many of ``count`` a limit leaves: an int is their number, a float a share of them."""
    if isinstance(limit, int):
        return min(int(limit), count)
    kept: int = math.floor(limit * count + 1e-9)  # 0.29 · 100 is a little less than 29
    if limit and not kept:
        raise FireflyError(f"trainer.{name} {limit} of {count} {of} is less than one; raise it, or give a whole number")
    return kept


def _given(trainer: Any, name: str) -> Any:
    """A setting as the user gave it, also where an earlier run of the trainer has set it."""
    value = getattr(trainer, name, 1.0)
    given, put = getattr(trainer, _GIVEN, {}).get(name, (value, value))
    return given if (type(value), value) == (type(put), put) else value


def _put(trainer: Any, name: str, value: Any) -> None:
    kept = vars(trainer).setdefault(_GIVEN, {})
    kept[name] = _given(trainer, name), value
    setattr(trainer, name, value)
