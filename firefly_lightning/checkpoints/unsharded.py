"""Turns a checkpoint that Lightning keeps as one dictionary in one process into a portable checkpoint, and back."""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from firefly_lightning.checkpoints.layout import (
    BY_NAME,
    FILES_KEY,
    NAMES_KEY,
    SCALARS_KEY,
    TENSOR_KEYS,
    TIED_KEY,
    TRAINER_FILE,
    WEIGHT,
)
from firefly_lightning.checkpoints.portable import PortableReader, PortableWriter, finish
from firefly_lightning.errors import FireflyError


def can_be_portable(checkpoint: Mapping[str, Any]) -> bool:
    """Whether all tensors of a checkpoint have names; it holds weights alone, or the states of one optimizer too."""
    optimizers = checkpoint.get("optimizer_states", [])
    named = len(optimizers) == 0 or (len(optimizers) == 1 and None not in checkpoint.get(NAMES_KEY, [[None]])[0])
    return named and NAMES_KEY in checkpoint and "state_dict" in checkpoint


def write_whole(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint for which :func:`can_be_portable` holds as a portable checkpoint.

    Args:
        checkpoint: Lightning's checkpoint, with ``state_dict`` and ``optimizer_states``.
        folder: The folder to fill, under its temporary name.
    """
    states, scalars = _by_name(checkpoint)
    writer, tied = PortableWriter(folder, rank=0), {}
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in checkpoint["state_dict"].items():
        first = seen.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if first == name:
            writer.add(name, {WEIGHT: tensor, **states.get(name, {})})
        else:
            tied[name] = first
    kept = {name: value for name, value in checkpoint.items() if name not in TENSOR_KEYS}
    files = writer.close()
    more = {TIED_KEY: tied, SCALARS_KEY: summed_up(scalars), FILES_KEY: sorted(files)}
    torch.save(kept | more, folder / TRAINER_FILE)
    finish(folder, files)


def read_whole(reader: PortableReader) -> dict[str, Any]:
    """Lightning's checkpoint from a portable one; an optimizer can load its states after :func:`accept_names`."""
    checkpoint = reader.trainer()
    weights = {name: reader.weight(name) for name in reader.names()}
    weights |= {name: weights[first] for name, first in checkpoint[TIED_KEY].items()}
    states = {
        name: scalars_of(checkpoint, name) | {key: reader.state(key, name) for key in keys}
        for name in reader.names()
        if (keys := reader.keys(name))
    }
    return checkpoint | {"state_dict": weights, "optimizer_states": [{BY_NAME: states}]}


def summed_up(scalars: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers that an optimizer counts for each parameter, kept once for all parameters that have the same."""
    common = dict(next(iter(scalars.values()), {}))
    own = {name: dict(values) for name, values in scalars.items() if values != common}
    return {"all": common, "own": own}


def scalars_of(trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The numbers that the optimizer had counted for a parameter, from the contents of ``trainer.ckpt``."""
    saved = trainer[SCALARS_KEY]
    values = saved["own"].get(name, saved["all"])
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def is_scalar(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a number that it counts, rather than a tensor with dimensions."""
    return not isinstance(value, Tensor) or value.dim() == 0


def numbered_names(module: nn.Module, optimizer: Optimizer) -> list[str | None]:
    """Names of an optimizer's parameters in the order of their numbers; None for each that the module lacks."""
    names = parameter_names(module)
    return [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names of a module's parameters by their ``id``; of a parameter with two names, the first."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def accept_names(module: nn.Module, optimizer: Optimizer) -> None:
    """Makes ``optimizer.load_state_dict`` take states by parameter name too; the optimizer then keeps its settings.

    States of another kind of optimizer are refused, by name or by number.
    """

    def numbered(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        by_name = BY_NAME in state
        own, saved = optimizer.state_dict(), state[BY_NAME] if by_name else state.get("state", {})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        names: Sequence[Any] = numbered_names(module, optimizer) if by_name else range(len(parameters))
        check_states(
            optimizer,
            (
                (parameter.dim(), [key for key, value in saved.get(name, {}).items() if not is_scalar(value)])
                for name, parameter in zip(names, parameters, strict=True)
            ),
        )
        if not by_name:
            return None
        return own | {"state": {number: saved[name] for number, name in enumerate(names) if name in saved}}

    optimizer.register_load_state_dict_pre_hook(numbered)


def check_states(optimizer: Optimizer, saved: Iterable[tuple[int, Collection[str]]]) -> None:
    """Refuses the states of another kind of optimizer, with which this one could not step.

    Args:
        optimizer: The optimizer that is to go on from the states.
        saved: For each parameter, its number of dimensions, which decides which states some optimizers keep, and the
            keys of its saved tensors; no keys for a parameter that was not trained.

    Raises:
        FireflyError: If the keys are not those of the tensors that this optimizer keeps.
    """
    for dimensions, keys in sorted({(dimensions, tuple(sorted(keys))) for dimensions, keys in saved if keys}):
        kept = _kept_states(optimizer, dimensions)
        if kept is not None and kept != set(keys):
            name, has = type(optimizer).__name__, ", ".join(sorted(kept)) or "nothing"
            raise FireflyError(
                f"the checkpoint's optimizer keeps {', '.join(keys)} of a weight, {name} keeps {has}; "
                "resume with the optimizer that it was saved with"
            )


def _kept_states(optimizer: Optimizer, dimensions: int) -> set[str] | None:
    """Keys of the tensors that an optimizer keeps for a parameter, found by a trial step; None if that step fails."""
    parameter, known = Parameter(torch.zeros([2] * dimensions)), inspect.signature(type(optimizer)).parameters
    parameter.grad = torch.zeros_like(parameter)
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    try:
        example: Any = type(optimizer)([parameter], **settings)
        example.step()
    except Exception:  # of any type: a closure, a device or an argument is missing
        return None
    return {key for key, value in example.state[parameter].items() if not is_scalar(value)}


def _by_name(checkpoint: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """The optimizer's states by name of the parameter: first the tensors, then the numbers that are counted."""
    tensors: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for optimizer, names in zip(checkpoint.get("optimizer_states", []), checkpoint[NAMES_KEY], strict=False):
        for number, state in optimizer["state"].items():
            name = names[number]
            tensors[name] = {key: value for key, value in state.items() if not is_scalar(value)}
            scalars[name] = {key: value for key, value in state.items() if is_scalar(value)}
    return tensors, scalars
