"""Turns a checkpoint that Lightning keeps as one dictionary in one process into a portable checkpoint, and back."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from firefly_lightning.checkpoints.host_copies import HostCopies
from firefly_lightning.checkpoints.layout import (
    BY_NAME,
    FILES_KEY,
    NAMES_KEY,
    SCALARS_KEY,
    TENSOR_KEYS,
    TIED_KEY,
    WEIGHT,
)
from firefly_lightning.checkpoints.portable import PortableReader, PortableWriter, as_file, finish
from firefly_lightning.errors import FireflyError
from firefly_lightning.optim.states import check_shapes, is_scalar, kept_for, keys_kept, put_together, taken_apart


def can_be_portable(checkpoint: Mapping[str, Any]) -> bool:
    """Whether all tensors of a checkpoint have names; it holds weights alone, or the states of one optimizer too."""
    optimizers = checkpoint.get("optimizer_states", [])
    named = len(optimizers) == 0 or (len(optimizers) == 1 and None not in checkpoint.get(NAMES_KEY, [[None]])[0])
    # What an optimizer keeps besides states and groups has no names either.
    named &= all(map(_has_names, optimizers))
    return named and NAMES_KEY in checkpoint and "state_dict" in checkpoint


def _has_names(saved: Mapping[str, Any]) -> bool:
    """Whether all that an optimizer saves is of numbered parameters; states of something else have no names."""
    numbered = saved.keys() == {"state", "param_groups"} and all(isinstance(number, int) for number in saved["state"])
    return numbered or not saved


def begin_whole(checkpoint: Mapping[str, Any], folder: Path, copies: HostCopies | None = None) -> Callable[[], None]:
    """Begins to write a checkpoint for which :func:`can_be_portable` holds as a portable checkpoint.

    Args:
        checkpoint: Lightning's checkpoint, with ``state_dict`` and ``optimizer_states``.
        folder: The folder to fill, under its temporary name.
        copies: Memory into which tensors are copied, if they change before they are written.

    Returns:
        What completes the folder; where tensors were copied, another thread may call it.
    """
    states, scalars = _by_name(checkpoint)
    writer, tied = PortableWriter(folder, rank=0, copies=copies), {}
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in checkpoint["state_dict"].items():
        first = seen.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if first == name:
            writer.add(name, {WEIGHT: tensor, **states.get(name, {})})
        else:
            tied[name] = first
    writer.finish_adding()
    kept = {name: value for name, value in checkpoint.items() if name not in TENSOR_KEYS}
    more = {TIED_KEY: tied, SCALARS_KEY: summed_up(scalars, states), FILES_KEY: sorted(writer.names)}
    trainer = as_file(kept | more)
    return lambda: finish(folder, writer.close(), trainer)


def write_whole(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint as :func:`begin_whole` does, to its end."""
    begin_whole(checkpoint, folder)()


def read_whole(reader: PortableReader) -> dict[str, Any]:
    """Lightning's checkpoint from a portable one; an optimizer can load its states after :func:`accept_names`."""
    checkpoint = reader.trainer()
    weights = {name: reader.weight(name) for name in reader.names()}
    weights |= {name: weights[first] for name, first in checkpoint[TIED_KEY].items()}
    states = {
        name: scalars_of(checkpoint, name) | {key: reader.state(key, name) for key in keys}
        for name in reader.names()
        if (keys := reader.keys(name)) or name in checkpoint[SCALARS_KEY]["own"]
    }
    return checkpoint | {"state_dict": weights, "optimizer_states": [{BY_NAME: states}]}


def summed_up(scalars: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """The numbers that an optimizer counts for each parameter, kept once for all parameters that have the same.

    Args:
        scalars: The numbers by name of the parameter and key.
        tensors: The tensors by name of the parameter; numbers of one that has no tensors are kept under its name.
    """
    common = dict(next((values for name, values in scalars.items() if tensors.get(name)), {}))
    own = {name: dict(values) for name, values in scalars.items() if values != common or not tensors.get(name)}
    return {"all": common, "own": {name: values for name, values in own.items() if values or common}}


def scalars_of(trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The numbers that the optimizer had counted for a parameter, from the contents of ``trainer.ckpt``."""
    saved = trainer[SCALARS_KEY]
    values = saved["own"].get(name, saved["all"])
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def numbered_names(module: nn.Module, optimizer: Optimizer) -> list[str | None]:
    """Names of an optimizer's parameters in the order of their numbers; None for each that the module lacks."""
    names = parameter_names(module)
    return [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names of a module's parameters by their ``id``; of a parameter with two names, the first."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def saved_parameters(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """The parameters that a checkpoint of a module holds, with their names.

    They are all, or those that are trained where the module's ``saves_trained_only`` is true: the others are then to be
    found elsewhere, as the weights of an adapter's base are.
    """
    trained_only = bool(getattr(module, "saves_trained_only", False))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or not trained_only:
            yield name, parameter


def accept_names(module: nn.Module, optimizer: Optimizer) -> None:
    """Makes ``optimizer.load_state_dict`` take states by parameter name too; the optimizer then keeps its settings."""
    load_numbered = optimizer.load_state_dict

    def load(state_dict: Any) -> None:
        if BY_NAME not in state_dict:
            load_numbered(state_dict)
        elif not _load_by_name(module, optimizer, state_dict[BY_NAME]):
            # An optimizer that a trial step says nothing of; it then has PyTorch's own rules for types.
            names = enumerate(numbered_names(module, optimizer))
            states = {number: state_dict[BY_NAME][name] for number, name in names if name in state_dict[BY_NAME]}
            load_numbered({**optimizer.state_dict(), "state": states})

    optimizer.load_state_dict = load  # type: ignore[method-assign]


def _load_by_name(module: nn.Module, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]]) -> bool:
    """Sets an optimizer's states; False, with none set, where what it keeps of a parameter cannot be told."""
    names, states = parameter_names(module), {}
    known: dict[Any, dict[str, Any] | None] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            entries = saved.get(names.get(id(parameter), ""))
            if entries is None:
                continue
            alike = number, parameter.shape, parameter.dtype, parameter.device
            if alike not in known:
                known[alike] = kept_for(optimizer, group, parameter)
            kept = known[alike]
            if kept is None:
                return False
            _check_keys(optimizer, entries, keys_kept(taken_apart(kept)))
            states[parameter] = put_together(entries, kept, parameter)
            check_shapes(names[id(parameter)], states[parameter], kept, parameter)
    optimizer.state.update(states)
    return True


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
        kept = kept_for(optimizer, optimizer.param_groups[0], torch.zeros([2] * dimensions))
        if kept is not None:
            _check_keys(optimizer, keys, keys_kept(kept))


def _check_keys(optimizer: Optimizer, saved: Mapping[str, Any] | Collection[str], kept: Collection[str]) -> None:
    keys = keys_kept(saved) if isinstance(saved, Mapping) else set(saved)
    if keys != set(kept):
        raise FireflyError(
            f"the checkpoint's optimizer keeps {_in_words(keys)} of a weight, {type(optimizer).__name__} keeps "
            f"{_in_words(kept)}; resume with the optimizer that it was saved with"
        )


def _in_words(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"


def keep_states(checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Any], whole: bool) -> None:
    """Adds the names of the optimizers' parameters to a checkpoint, and makes their states plain tensors and values.

    Args:
        checkpoint: Lightning's checkpoint.
        module: The module that has the parameters.
        optimizers: The run's optimizers; bitsandbytes', for one, say other keys in their ``state_dict`` than they keep.
        whole: Whether this process has whole states; otherwise they are left as the strategy gave them.
    """
    checkpoint[NAMES_KEY] = [numbered_names(module, optimizer) for optimizer in optimizers]
    for saved, optimizer in zip(checkpoint.get("optimizer_states", []) if whole else [], optimizers, strict=False):
        if not _has_names(saved):
            continue
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = ((number, optimizer.state.get(parameter)) for number, parameter in enumerate(parameters))
        saved["state"] = {number: taken_apart(state) for number, state in kept if state}


def name_states(checkpoint: dict[str, Any]) -> None:
    """Gives the states of a checkpoint of one file the names of their parameters, in place of numbers, in memory."""
    for number, names in enumerate(checkpoint.get(NAMES_KEY, []) if checkpoint.get("optimizer_states") else []):
        saved = checkpoint["optimizer_states"][number]
        if _has_names(saved) and None not in names:
            states = {names[place]: state for place, state in saved["state"].items()}
            checkpoint["optimizer_states"][number] = {BY_NAME: states}


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
