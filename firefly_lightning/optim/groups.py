"""Groups of parameters: which weights decay, and which of an adapter's learn faster."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from firefly_lightning.errors import FireflyError

LORA_PLUS = ("lora_B", "lora_embedding_B")
"""Parts of the names of the parameters that LoRA+ gives a higher learning rate, as peft names them."""


def make_in_groups(
    make: Callable[[Any], Optimizer],
    module: nn.Module,
    weight_decay: float = 0.0,
    lora_plus: float | None = None,
    trained_only: bool = False,
) -> Optimizer:
    """Makes an optimizer of a module's parameters, in groups only where a group has settings of its own.

    Args:
        make: Makes the optimizer of parameters or groups.
        module: The module.
        weight_decay: Decay of the weights of matrices and embeddings; 0 leaves it to ``make``.
        lora_plus: By how much the learning rate of the matrices B of LoRA is higher; None where it is not.
        trained_only: Whether parameters that are frozen now are left out.

    Raises:
        FireflyError: If the module has no matrices B of LoRA and their learning rate is to be higher, or the optimizer
            has no weight decay.
    """
    named = [(name, each) for name, each in module.named_parameters() if each.requires_grad or not trained_only]
    if not weight_decay and lora_plus is None:
        return make([parameter for _, parameter in named])
    decaying, faster = decaying_names(module), {name for name, _ in named if _is_faster(name)}
    if lora_plus is not None and not faster:
        raise FireflyError("model.loraplus_lr_ratio: the model has no LoRA to train; leave it out")
    groups: dict[tuple[bool, bool], list[Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((name in faster, name in decaying), []).append(parameter)
    if lora_plus is None:  # in the order of the names that the two groups have in transformers' Trainer
        groups = dict(sorted(groups.items(), reverse=True))
    decay = {True: {"weight_decay": weight_decay}, False: {"weight_decay": 0.0}} if weight_decay else {}
    optimizer = make([{"params": own, **decay.get(decays, {})} for (_, decays), own in groups.items()])
    if weight_decay and "weight_decay" not in optimizer.defaults:
        raise FireflyError(f"model.weight_decay: {type(optimizer).__name__} has no weight decay; leave it out")
    if lora_plus is not None:
        _raise_rates(optimizer, {id(each) for (fast, _), own in groups.items() if fast for each in own}, lora_plus)
    return optimizer


def decaying_names(module: nn.Module) -> set[str]:
    """Names of the parameters that decay: all but biases and those of layer norms, as in transformers' ``Trainer``."""
    norms = {id(each) for part in module.modules() if isinstance(part, nn.LayerNorm) for each in part.parameters()}
    return {name for name, each in module.named_parameters() if "bias" not in name and id(each) not in norms}


def _is_faster(name: str) -> bool:
    return any(part in LORA_PLUS for part in name.split("."))


def _raise_rates(optimizer: Optimizer, faster: set[int], ratio: float) -> None:
    for group in optimizer.param_groups:
        if all(id(parameter) in faster for parameter in group["params"]):
            group["lr"] = group["lr"] * ratio
