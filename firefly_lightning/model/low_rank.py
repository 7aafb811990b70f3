"""Calls linear layers of a block; what a plain LoRA of peft adds, it adds in one pass over memory instead of four."""

from typing import Any

import torch
from torch import Tensor, nn


def apply(layer: Any, given: Tensor) -> Tensor:
    """The output of a linear layer, with or without an adapter.

    peft computes the product of LoRA's two narrow matrices, then scales it, then adds it, each time as wide as the
    output. Here the narrow factor is scaled, and the product added while it is computed. All else, and a layer at which
    somebody's hook looks, is left to the layer itself.

    Args:
        layer: The layer.
        given: (tokens, in_features) its input.

    Returns:
        (tokens, out_features) what ``layer(given)`` gives, but for rounding.
    """
    name = _plain_lora(layer, given)
    if name is None:
        output: Tensor = layer(given)
        return output
    output = layer.base_layer(given)
    narrow = layer.lora_A[name](layer.lora_dropout[name](given)) * layer.scaling[name]
    # Autocast passes over operations in place.
    return output.addmm_(narrow.to(output.dtype), layer.lora_B[name].weight.t().to(output.dtype))


def _plain_lora(layer: Any, given: Tensor) -> str | None:
    """Name of the one adapter of a layer, if it is a LoRA that adds a product of two matrices and nothing else."""
    if type(layer).__module__ != "peft.tuners.lora.layer" or type(layer).__name__ != "Linear":
        return None
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged or layer.disable_adapters:
        return None
    name: str = names[0]
    down, up = layer.lora_A[name], layer.lora_B[name]
    # Releases of peft say in one way or another that it is DoRA or another variant.
    if layer.use_dora.get(name) or name in getattr(layer, "lora_variant", ()):
        return None
    if type(up) is not nn.Linear or up.bias is not None or _has_hooks(layer) or _has_hooks(up):
        return None
    fits = given.dtype == down.weight.dtype or torch.is_autocast_enabled(given.device.type)
    return name if fits and given.dim() == 2 else None


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward pass, as where DeepSpeed gathers its weights."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
