"""The optimizer of a run: made for its strategy, and tried before the weights are loaded."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim import AdamW, Optimizer

from firefly_lightning.errors import FireflyError
from firefly_lightning.optim.groups import make_in_groups
from firefly_lightning.optim.muon import mark_embeddings
from firefly_lightning.optim.rehearsal import attempt, check_elementwise, rehearse, small_bloom
from firefly_lightning.optim.schedule import check_counts_steps, cosine_schedule
from firefly_lightning.strategies.hooks import check_accumulation, hooks_of

_OF_ENGINES = ("deepspeed", "colossalai")


def make_optimizer(module: Any) -> Optimizer:
    """The optimizer that a module's settings ask for, of its parameters, as its strategy takes it.

    Args:
        module: The ``FireflyModule`` of the run.

    Raises:
        FireflyError: If the strategy cannot do the optimizer, or a group has no parameters.
    """
    ratio: float | None = module.loraplus_lr_ratio
    made = _in_groups(module, module, ratio, trained_only=module.saves_trained_only)
    if module.release_gradients:
        module.step_guard.release(made)
    return hooks_of(module.trainer.strategy).convert_optimizer(made)


def check_optimizer(module: Any) -> None:
    """Refuses what cannot train or be resumed, before weights are loaded: optimizer, schedule, groups, strategy.

    Args:
        module: The ``FireflyModule`` of the run.

    Raises:
        FireflyError: If something cannot be done; the message names the key.
    """
    trainer, strategy = module.trainer, module.trainer.strategy
    check_accumulation(strategy, trainer.accumulate_grad_batches)
    if module.loraplus_lr_ratio is not None and not module.saves_trained_only:
        raise FireflyError("model.loraplus_lr_ratio: is for the matrices of an adapter; set model.adapter: lora")
    if module.release_gradients:
        check_can_release(trainer)
    make = partial(_in_groups, module)
    optimizer = attempt(lambda: make(small_bloom()))
    hooks = hooks_of(strategy)
    converted = hooks.convert_optimizer(optimizer)
    if module.lr_scheduler:
        check_counts_steps(attempt(lambda: module.lr_scheduler(converted), "model.lr_scheduler: cannot be made"))
    if module.optimizer is None or type(optimizer).__module__.startswith(_OF_ENGINES):
        return
    root = strategy.root_device
    device = torch.device("cpu") if root.type == "cpu" else root
    schedule = module.lr_scheduler or partial(cosine_schedule, warmup=1, steps=2)
    rehearse(make, schedule, device, module.release_gradients)
    if hooks.splits_states:
        check_elementwise(module.optimizer)


def _in_groups(
    module: Any, weights: nn.Module, lora_plus: float | None = None, trained_only: bool = False
) -> Optimizer:
    mark_embeddings(weights)
    return make_in_groups(
        module.optimizer or partial(_adamw, module), weights, module.weight_decay, lora_plus, trained_only
    )


def _adamw(module: Any, parameters: Any) -> Optimizer:
    """PyTorch's AdamW, fused into one pass over the weights where nothing else touches their gradients."""
    whole = hooks_of(module.trainer.strategy).whole_states
    fused = whole and module.trainer.precision != "16-mixed"  # Lightning cannot clip scaled gradients then
    return AdamW(parameters, module.learning_rate, weight_decay=0.0, fused=fused or None)


def check_can_release(trainer: Any) -> None:
    """Refuses runs whose gradients must be there together.

    Args:
        trainer: The trainer of the run.

    Raises:
        FireflyError: If the run is such a run; the message says why.
    """
    problems = {
        "this strategy reduces or shards gradients; train on one device": not isinstance(
            trainer.strategy, SingleDeviceStrategy
        ),
        f"a step adds up {trainer.accumulate_grad_batches} micro-batches; set data.micro_batch_size higher": (
            trainer.accumulate_grad_batches > 1
        ),
        f"trainer.gradient_clip_val {trainer.gradient_clip_val} needs all gradients at once; leave it out": bool(
            trainer.gradient_clip_val
        ),
        "trainer.precision 16-mixed scales gradients and skips whole steps; take bf16-mixed": (
            trainer.precision == "16-mixed"
        ),
    }
    for problem, found in problems.items():
        if found:
            raise FireflyError(f"model.release_gradients: {problem}")
