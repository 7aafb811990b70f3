"""The learning rate over a run."""

import inspect
import math
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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
