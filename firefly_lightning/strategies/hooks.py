"""What FireflyModule asks of a strategy beyond Lightning's interface, answered for one device and DDP."""

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.catalogue import CATALOGUE


class StrategyHooks:
    """Answers for a strategy that keeps the whole model on every device; one that shards inherits and overrides them.

    Attributes:
        norm_follows_step: Whether the gradient's norm is known only after the optimizer's step, because the engine
            computes it there.
        generates_in_step: Whether ranks must call the model equally often, because a forward pass is collective.
        whole_weights: Whether a process holds all weights as plain tensors all the time, so that a weight may be used
            without calling the module that it belongs to.
        trains_adapters: Whether some weights may be trained while all others are frozen.
        whole_states: Whether a process holds the states of the optimizer as the optimizer made them.
        splits_states: Whether the optimizer updates parts of weights, so that it must update each number by itself.
        evaluates_first: Whether a run that trains can evaluate before its first step.
    """

    norm_follows_step = False
    generates_in_step = False
    whole_weights = False
    trains_adapters = False
    whole_states = False
    splits_states = False
    evaluates_first = True

    def check_model(self, config: BloomConfig) -> None:
        """Refuses a model that this strategy cannot train; called before weights are loaded.

        Args:
            config: Configuration of the model that is about to be loaded.

        Raises:
            FireflyError: If the strategy cannot train the model.
        """

    def check_adapter(self, quantized: bool) -> None:
        """Refuses an adapter where this strategy cannot train one; called before weights are loaded.

        Args:
            quantized: Whether the frozen weights are kept in 4 or 8 bits, which nothing can shard.

        Raises:
            FireflyError: If the strategy trains whole models only, or would shard quantised weights.
        """
        able = [entry for entry in CATALOGUE if entry.trains_adapters and (entry.whole_weights or not quantized)]
        names = ", ".join(entry.name for entry in able)
        if not self.trains_adapters:
            raise FireflyError(f"model.adapter: this strategy trains all weights only; take one of {names}")
        if quantized and not self.whole_weights:
            raise FireflyError(
                f"model.quantize: this strategy shards weights, which must be whole; take one of {names}"
            )

    def build_model(
        self,
        config: BloomConfig,
        build: Callable[[], BloomForCausalLM],
        put_adapter: Callable[[BloomForCausalLM], None],
    ) -> BloomForCausalLM:
        """The model with its weights and its adapter, sharded where the strategy shards before the optimizer is made.

        Args:
            config: Configuration of the model.
            build: Makes the whole model in host memory of the process that calls it.
            put_adapter: Puts the adapter, if the run has one, into a model, whose weights need not be in memory.
        """
        bloom = build()
        put_adapter(bloom)
        return bloom

    def own_heads(self, count: int) -> slice:
        """Which of the model's ``count`` attention heads this process computes."""
        return slice(count)

    def convert_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The engine's own optimizer of the same kind, with the same parameters and settings.

        Raises:
            FireflyError: If the engine has no such optimizer.
        """
        return optimizer

    def gradient_norm(self, parameters: Iterable[Parameter]) -> Tensor:
        """Euclidean norm of the whole gradient of a step before clipping, the same on every rank.

        Called before the optimizer's step, or after it where ``norm_follows_step``.
        """
        norms = [torch.linalg.vector_norm(parameter.grad) for parameter in parameters if parameter.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def check_accumulation(strategy: Strategy, micro_batches: int) -> None:
    """Refuses Lightning's own DeepSpeed strategies where gradients are accumulated, since these divide them twice.

    Args:
        strategy: Strategy of the run.
        micro_batches: Number of micro-batches that make an optimizer step on one rank.

    Raises:
        FireflyError: If the strategy is one of Lightning's for DeepSpeed and a step has several micro-batches.
    """
    ours = isinstance(strategy, StrategyHooks)
    if isinstance(strategy, DeepSpeedStrategy) and not ours and micro_batches > 1:
        stage = (strategy.config or {}).get("zero_optimization", {}).get("stage")
        raise FireflyError(
            f"Lightning's own DeepSpeed strategy divides gradients by {micro_batches} micro-batches twice; "
            f"take trainer.strategy zero{stage}, which does not"
        )


def hooks_of(strategy: Strategy | None) -> StrategyHooks:
    """A strategy's own hooks, or those of one device and DDP where the strategy has none."""
    if isinstance(strategy, StrategyHooks):
        return strategy
    hooks = StrategyHooks()
    plain = strategy is None or isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    hooks.whole_weights = hooks.whole_states = hooks.trains_adapters = plain
    return hooks
