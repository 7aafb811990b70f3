"""What is most likely a mistake in a run, said before its weights are loaded."""

import difflib
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.data.limits import last_step
from firefly_lightning.data.protocol import PlannedData, data_of
from firefly_lightning.errors import FireflyError
from firefly_lightning.model.metric_names import of_kind
from firefly_lightning.module import FireflyModule
from firefly_lightning.preference.objective import FIGURES
from firefly_lightning.preference.pairs import PlannedPairs

OF_STEPS = ("train_loss", "lr", "grad_norm", "target_tokens_per_second", "data_wait", "memory_gb", "mfu")
OF_VALIDATIONS = ("val_loss", "val_perplexity", "val_accuracy", "val_eos_accuracy")
OF_PAIRS = tuple(f"val_{name}" for name in FIGURES)
"""Metrics that every run logs, of steps and of validations, and those of pairs in place of the last of them; those of
kinds are called ``val_perplexity_of/KIND``."""


SLOWER = 1.2
"""How many times as long as in float32 products in 16 bits must take to be warned of."""

ENOUGH = 0.1
"""Seconds after which products are not measured again: some processors take a hundred times as long in float16."""


class StartChecks(Callback):
    """Warns of settings that do not go together before a training begins, and refuses what Lightning would refuse.

    It knows data modules of this project only, since other data do not say how many steps they make.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks a training, once its data are planned.

        Raises:
            FireflyError: If validations are further apart than an epoch is long, and are to be counted in each epoch.
        """
        data = data_of(trainer)
        if stage != "fit" or trainer.fast_dev_run or data is None or data.train is None:  # type: ignore[attr-defined]
            return
        warnings = chain(
            _of_steps(data),
            _of_warm_up(trainer, pl_module, data),
            _of_validation(trainer, data),
            _of_monitors(trainer, data),
            _of_precision(trainer),
        )
        for warning in warnings:
            rank_zero_info(f"warning: {warning}")


def _last(trainer: L.Trainer, data: PlannedData) -> float:
    assert data.train is not None
    return last_step(trainer, data.train.steps_per_epoch)


def _of_steps(data: PlannedData) -> Iterator[str]:
    plan = data.train.plan  # type: ignore[union-attr]
    if plan.batch_size > plan.rows_per_epoch:
        yield (
            f"data.batch_size {plan.batch_size:,} is more than the {plan.rows_per_epoch:,} rows of an epoch, so that "
            "each step takes them all; a run is saved and ended between steps only"
        )


def _of_warm_up(trainer: L.Trainer, module: L.LightningModule, data: PlannedData) -> Iterator[str]:
    steps = _last(trainer, data)
    if isinstance(module, FireflyModule) and module.lr_scheduler is None and module.warmup_steps >= steps:
        reached = module.learning_rate * max(steps - 1, 0) / max(module.warmup_steps, 1)
        yield (
            f"model.warmup_steps {module.warmup_steps:,} is not less than the {steps:,} steps of the run, so that the "
            f"learning rate ends at {reached:.2g} instead of {module.learning_rate:.2g}; shorten it"
        )


def _of_validation(trainer: L.Trainer, data: PlannedData) -> Iterator[str]:
    """What is wrong with the steps between validations.

    Raises:
        FireflyError: If no epoch is as long as the steps between validations that are to be counted in each.
    """
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if data.train is None or trainer.limit_val_batches == 0 or not isinstance(interval, int | float):
        return
    steps, per_epoch = _last(trainer, data), data.train.steps_per_epoch
    # In micro-batches, once the data are planned; a share of an epoch is such a number, too.
    every = interval // data.train.micro_batches_per_step if isinstance(interval, int) else per_epoch
    if epochs is not None and every > per_epoch:
        raise FireflyError(
            f"trainer.val_check_interval {every:,} is more than the {per_epoch:,} steps of an epoch; choose less, "
            "or set trainer.check_val_every_n_epoch to null, so that it counts through the ends of epochs"
        )
    first = every if epochs is None else (epochs - 1) * per_epoch + every
    if data.val is not None and first > steps:
        yield (
            f"the run has {steps:,} steps and is first validated after {first:,}, so never, and keeps no best "
            "checkpoint; choose a smaller trainer.val_check_interval"
        )


def _of_monitors(trainer: L.Trainer, data: PlannedData) -> Iterator[str]:
    """Names that callbacks wait for and no run logs, where one that is logged is nearly the same."""
    kinds = data.val.rows.kinds if data.val else []
    of_pairs = isinstance(data.val or data.train, PlannedPairs)
    of_val = ("val_loss", *OF_PAIRS) if of_pairs else OF_VALIDATIONS
    of_steps = (*OF_STEPS, *(f"train_{name}" for name in FIGURES)) if of_pairs else OF_STEPS
    known = {*of_steps, *of_val, *(of_kind(name, kind) for name in of_val[1:] for kind in kinds)}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name: Any = getattr(callback, "monitor", None)
        if isinstance(name, str) and name not in known and (near := difflib.get_close_matches(name, known, 1, 0.8)):
            yield f"{type(callback).__name__} monitors {name}, which is not logged; did you mean {near[0]}?"


def _of_precision(trainer: L.Trainer) -> Iterator[str]:
    """Products in 16 bits that a processor has no units for; a GPU that trains in them has."""
    precision = str(trainer.precision)
    if precision.startswith(("16", "bf16")) and trainer.strategy.root_device.type == "cpu":
        name, dtype = ("bfloat16", torch.bfloat16) if precision.startswith("bf16") else ("float16", torch.float16)
        if (times := times_as_long(dtype)) > SLOWER:
            yield (
                f"trainer.precision {precision}: products of matrices take {times:.1f} times as long in {name} as in "
                "float32 on this processor; 32-true is faster here"
            )


def times_as_long(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product of the size of a linear layer takes; measured in a moment."""
    return _fastest(dtype) / _fastest(torch.float32)


def _fastest(dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 10 and sum(seconds) < ENOUGH:
        began = time.perf_counter()
        _ = left @ right
        seconds.append(time.perf_counter() - began)
    return min(seconds)
