"""The plugin that writes a run's checkpoints as a callback wants them, in place of the one that a trainer was given."""

from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints


def in_own_form(strategy: Strategy) -> CheckpointIO:
    """The plugin that writes a strategy's checkpoints in its own form, in place of the one that the trainer was given.

    One device and DDP write their own form anyway where the trainer has none of this project's plugins.
    """
    io = strategy.checkpoint_io
    if isinstance(io, AtomicCheckpointIO):
        return io.in_own_form()
    nobodys_choice = type(io) is TorchCheckpointIO
    return AtomicCheckpointIO(portable=False) if nobodys_choice and isinstance(strategy, ShardedCheckpoints) else io


def in_background(strategy: Strategy) -> CheckpointIO:
    """The plugin that writes a strategy's checkpoints while the training goes on.

    Raises:
        FireflyError: If the trainer was given a plugin that is not this project's.
    """
    io = strategy.checkpoint_io
    if not isinstance(strategy, ShardedCheckpoints) and type(strategy).save_checkpoint is not Strategy.save_checkpoint:
        rank_zero_info(
            f"checkpoint.asynchronous: {type(strategy).__name__} writes checkpoints itself; the training waits for it"
        )
        return io
    if isinstance(io, AtomicCheckpointIO):
        return io.in_background()
    if type(io) is TorchCheckpointIO:
        return AtomicCheckpointIO(asynchronous=True)
    raise FireflyError(
        f"checkpoint.asynchronous: {type(io).__name__} cannot do it; give the trainer AtomicCheckpointIO"
    )
