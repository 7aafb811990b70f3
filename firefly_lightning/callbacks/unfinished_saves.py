"""Saves that go on beside a training: all its processes learn of a failure, and wait for them together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L

from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.errors import FireflyError


def have_failed(trainer: L.Trainer) -> bool:
    """Whether a save has failed in any process; all call this together."""
    io = trainer.strategy.checkpoint_io
    return isinstance(io, AtomicCheckpointIO) and io.asynchronous and _any(trainer, io.saves.failed)


def settle(trainer: L.Trainer) -> None:
    """Waits until all saves are complete in all processes, which call this together.

    Raises:
        FireflyError: If one failed, in this process or in another.
    """
    io = trainer.strategy.checkpoint_io
    if isinstance(io, AtomicCheckpointIO) and io.asynchronous:
        io.saves.settle(lambda act: _together(trainer, act))


@contextmanager
def at_once(trainer: L.Trainer) -> Iterator[None]:
    """Has checkpoints that are saved in the block complete before it goes on."""
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, AtomicCheckpointIO):
        yield
        return
    io.at_once = True
    try:
        yield
    finally:
        io.at_once = False


def _any(trainer: L.Trainer, decision: bool) -> bool:
    return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))


def _together(trainer: L.Trainer, act: Callable[[], None]) -> None:
    failure: Exception | None = None
    try:
        act()
    except Exception as error:  # raised again once the others know
        failure = error
    if _any(trainer, failure is not None):
        raise failure or FireflyError("another process could not save its part; its own message says why")
