"""What one process of a run cannot do ends all of them, which would else wait for it."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from firefly_lightning.errors import FireflyError, reason

T = TypeVar("T")


def agreed(act: Callable[[], T]) -> T:
    """Acts on every process, which all call this; ``act`` itself must not wait for others.

    Raises:
        FireflyError: If another process could not; what one's own ``act`` raises comes through.
    """
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:  # raised again once the others know
        failure = error
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, reason(failure) if failure else "")
    if failure:
        raise failure
    if any(problems):
        raise FireflyError(next(filter(None, problems)))
    return result
