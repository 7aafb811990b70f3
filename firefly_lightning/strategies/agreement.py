"""An error of one process of a run ends all of them; otherwise the others would wait for it forever."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from firefly_lightning.errors import FireflyError, reason

T = TypeVar("T")


def agreed(act: Callable[[], T]) -> T:
    """Calls ``act`` and returns its result; all processes call this together, and ``act`` must not wait for others.

    Raises:
        FireflyError: If ``act`` failed on another process; what it raises on this process is raised as it is.
    """
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:  # raised again once the others know
        failure = error
    problems = from_all(reason(failure) if failure else "")
    if failure:
        raise failure
    if any(problems):
        raise FireflyError(next(filter(None, problems)))
    return result


def from_all(own: T) -> list[T]:
    """What each process gives, in the order of the processes; all of them call this together."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
