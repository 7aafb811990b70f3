"""Lightning's callbacks that would break what a run promises; they are refused when it begins, with the reason."""

from typing import Any

from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints

REASONS: dict[type[Callback], str] = {
    LearningRateFinder: "its finding would not reach the schedule, and it forgets the checkpoint that a run resumes; "
    "compare short runs with other model.learning_rate and trainer.max_steps",
    BackboneFinetuning: "it trains a `backbone`, which a module around a Bloom does not have; "
    "derive a callback of your own from BaseFinetuning",
    BatchSizeFinder: "data.batch_size is the rows of a step, which memory does not decide; "
    "set data.micro_batch_size, for which firefly plan says how much memory it takes",
    ModelPruning: "its masks would not be in a checkpoint; to make a model smaller, run firefly prune",
    SpikeDetection: "a run with it cannot be resumed; metrics.csv shows spikes of the loss, "
    "and a loss that is not finite ends a run",
    StochasticWeightAveraging: "it averages a copy of the module from before the weights are loaded, which has none; "
    "take WeightAveraging or EMAWeightAveraging",
}
"""Why a callback is refused, and what to do."""

SHARDED = "it averages whole weights, and this strategy shards them; take one device or ddp"


def check_callbacks(trainer: Any) -> None:
    """Refuses callbacks of Lightning's that a run cannot keep its promises with.

    Args:
        trainer: The trainer of the run.

    Raises:
        FireflyError: If one of its callbacks is such a callback.
    """
    sharded = {WeightAveraging: SHARDED} if isinstance(trainer.strategy, ShardedCheckpoints) else {}
    for callback in trainer.callbacks:
        for unsuited, reason in (REASONS | sharded).items():
            if isinstance(callback, unsuited):
                raise FireflyError(f"trainer.callbacks: {type(callback).__name__} cannot be used here: {reason}")
