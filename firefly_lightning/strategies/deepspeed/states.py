"""Reads and sets the model that ZeRO trains, one whole parameter after another, as portable checkpoints hold it.

DeepSpeed's own functions read and set the sharded tensors. Import this module only after DeepSpeed itself.
"""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import Parameter

from firefly_lightning.checkpoints.layout import WEIGHT
from firefly_lightning.checkpoints.portable import PortableReader, States
from firefly_lightning.checkpoints.unsharded import check_states, saved_parameters, scalars_of
from firefly_lightning.optim.states import is_scalar


def read_states(zero: Any, module: nn.Module) -> Iterator[tuple[str, States]]:
    """Yields each parameter's name, with its float32 master and optimizer states, or its weight if it is not trained.

    Args:
        zero: The engine's optimizer; None where there is none.
        module: The module that the engine trains.
    """
    keys = [key for key, value in _any_state(zero).items() if not is_scalar(value)]
    for name, parameter in saved_parameters(module):
        if _is_trained(zero, parameter):
            states = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            yield name, {WEIGHT: safe_get_full_fp32_param(parameter), **states}
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=_is_sharded(parameter)):
                weight = parameter.detach().clone()
            yield name, {WEIGHT: weight}


def scalars(zero: Any) -> dict[str, Tensor]:
    """Numbers that the optimizer counts for a parameter, such as its steps, the same for all; none before the first."""
    counted = {key: value for key, value in _any_state(zero).items() if is_scalar(value)}
    # As PyTorch's optimizers have them; DeepSpeed's own Adam counts in integers.
    return {key: torch.tensor(float(value)) for key, value in counted.items() if value is not None}


def write_states(zero: Any, module: nn.Module, reader: PortableReader) -> None:
    """Sets masters, states of the optimizer and weights to those of a checkpoint, before the first step.

    Args:
        zero: The engine's optimizer.
        module: The module that the engine trains.
        reader: Reads the checkpoint.
    """
    if example := next((name for name, _ in module.named_parameters() if reader.keys(name)), None):
        _make_states(zero, reader, example)
    for name, parameter in saved_parameters(module):
        if _is_trained(zero, parameter):
            _set(parameter, reader.weight(name))
            for key in reader.keys(name):
                _set(parameter, reader.state(key, name), key)
        else:
            write_weight(parameter, reader, name)
    _pass_on(zero)


def write_weights(module: nn.Module, reader: PortableReader) -> None:
    """Sets the weights of a module that has no optimizer, sharded or not, to those of a checkpoint."""
    for name, parameter in saved_parameters(module):
        write_weight(parameter, reader, name)


def write_weight(parameter: Parameter, reader: PortableReader, name: str) -> None:
    """Sets a weight without a master to that of a checkpoint; a sharded one is read by the first process for all."""
    sharded = _is_sharded(parameter)
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
        if not sharded or torch.distributed.get_rank() == 0:
            parameter.copy_(reader.weight(name))


def scaler_state(zero: Any) -> dict[str, Any]:
    """What the scaler of the loss has learned, by the keys of ``GradScaler``; empty where no loss is scaled."""
    scaler: Any = getattr(zero, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    stable = scaler.cur_iter - scaler.last_overflow_iter - 1
    stable = (stable - 1) % scaler.scale_window + 1 if stable else 0
    return {
        "scale": float(scaler.cur_scale),
        "growth_factor": scaler.scale_factor,
        "backoff_factor": 1 / scaler.scale_factor,
        "growth_interval": scaler.scale_window,
        "_growth_tracker": min(stable, scaler.scale_window - 1),
        "stable": stable,  # DeepSpeed's scale grows a step later than PyTorch's
        "tolerated": scaler.cur_hysteresis - 1,  # overflows before the scale shrinks
    }


def load_scaler_state(zero: Any, state: dict[str, Any]) -> None:
    """Sets the scale and the counters that the scaler of any strategy has learned."""
    scaler: Any = getattr(zero, "loss_scaler", None)
    if getattr(scaler, "dynamic", False) and state:
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = state.get("stable", state["_growth_tracker"]), -1
        scaler.cur_hysteresis = state.get("tolerated", 0) + 1


def _is_sharded(parameter: Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _is_trained(zero: Any, parameter: Parameter) -> bool:
    """Whether the optimizer has a master of the parameter, which is then neither frozen nor left out."""
    if _is_sharded(parameter):
        return parameter.requires_grad and zero.get_param_id(parameter) in getattr(zero, "grad_position", ())
    return hasattr(parameter, "_hp_mapping")


def _masters(zero: Any) -> list[Tensor]:
    """The long tensors that the optimizer steps on, which hold this process's parts of all parameters."""
    sharded = getattr(zero, "fp32_partitioned_groups_flat", None)
    if sharded is not None:
        return list(sharded)
    return [parameter for group in zero.optimizer.param_groups for parameter in group["params"]]


def _any_state(zero: Any) -> dict[str, Any]:
    """The state that the optimizer keeps for one of its masters; empty before the first step."""
    inner = getattr(zero, "optimizer", None)
    return next(iter(inner.state.values()), {}) if inner else {}


def _make_states(zero: Any, reader: PortableReader, example: str) -> None:
    """Makes the optimizer states that would exist after a first step, since DeepSpeed sets only existing ones.

    Args:
        zero: The engine's optimizer.
        reader: Reads the checkpoint, which says what states there are.
        example: Name of a parameter that has states in the checkpoint.
    """
    inner, scalars = zero.optimizer, scalars_of(reader.trainer(), example)
    check_states(inner, reader.states_like_weights())
    if "DeepSpeed" in type(inner).__name__:  # its C++ takes the step as a number
        scalars = {name: int(value) for name, value in scalars.items()}
    for number, master in enumerate(_masters(zero)):
        swapped = hasattr(zero, "_swappable_optimizer_subgroup") and zero._swappable_optimizer_subgroup(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(number)
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in scalars.items()}
        inner.state[master] = own | {key: torch.zeros_like(master.data) for key in reader.keys(example)}
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(number)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: Parameter, value: Tensor, key: str | None = None) -> None:
    if not _is_sharded(parameter):
        setter = safe_set_full_fp32_param if key is None else safe_set_full_optimizer_state
        setter(parameter, value, *([] if key is None else [key]))
        return
    # DeepSpeed's setter of whole tensors reads past the end of one that the processes do not divide evenly.
    part = _part(parameter, value)
    setter = safe_set_local_fp32_param if key is None else safe_set_local_optimizer_state
    setter(parameter, part, *([] if key is None else [key]))


def _part(parameter: Any, value: Tensor) -> Tensor:
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    missing = size * torch.distributed.get_world_size(group) - value.numel()
    return F.pad(value.flatten(), (0, missing)).narrow(0, size * torch.distributed.get_rank(group), size)


def _pass_on(zero: Any) -> None:
    """Copies the masters into the weights of the model, as the optimizer does at the end of a step."""
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
        return
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if kept := zero.persistent_parameters:
        kept[0].partition(kept)
        kept[0].all_gather(kept)
