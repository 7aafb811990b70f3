"""Saves that go on beside a training: all its processes learn of a failure, and wait for them together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from torch import Tensor

from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.unsharded import saved_parameters
from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints


def have_failed(trainer: L.Trainer) -> bool:
    """Whether a save has failed in any process; all call this together."""
    io = trainer.strategy.checkpoint_io
    return isinstance(io, AtomicCheckpointIO) and io.asynchronous and _any(trainer, io.saves.failed)


def make_room(trainer: L.Trainer) -> None:
    """Has memory for copies allocated once the optimizer has its states, on the process that copies all of them."""
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, AtomicCheckpointIO) or not io.asynchronous or not trainer.is_global_zero:
        return
    if not isinstance(trainer.strategy, ShardedCheckpoints):
        weights = (weight for _, weight in saved_parameters(trainer.lightning_module))
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        kept = (value for state in states for value in state.values() if isinstance(value, Tensor))
        io.make_room([*weights, *kept])


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
