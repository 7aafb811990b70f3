"""What an optimizer keeps for a parameter, as plain tensors and values that any file can hold, and back again.

An optimizer may keep tensors of any shape, numbers, tensors of a class of its own, and dictionaries and lists of these.
Plain tensors and numbers stay under their keys. What is made of parts gives each part under ``KEY.PART``; its form says
how they belong together. A class is never named by a checkpoint: it is that of what this optimizer keeps there.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from firefly_lightning.errors import FireflyError

FORMS = "forms"
"""Key of the forms of what is made of parts, in the entries that :func:`taken_apart` gives."""

SMALL_ROWS = 256
"""Rows of a matrix of which a trial step takes all; of more, the optimizers that were tried keep states alike."""


def is_scalar(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a number that it counts, rather than a tensor with dimensions."""
    return not isinstance(value, Tensor) or value.dim() == 0


def taken_apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state that an optimizer keeps for a parameter, as plain tensors and values by key, with their forms.

    Raises:
        FireflyError: If something in it is neither a tensor nor a plain value, nor made of such.
    """
    entries: dict[str, Any] = {}
    forms: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        _take_apart(str(key), value, entries, forms)
    return entries | ({FORMS: forms} if forms else {})


def put_together(entries: Mapping[str, Any], kept: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state of which :func:`taken_apart` gave the entries.

    Args:
        entries: Plain tensors and values by key, with their forms.
        kept: What the optimizer keeps for such a parameter, as :func:`kept_for` gives it: it decides the classes, the
            type of floating-point numbers and on which device each tensor is.
        parameter: The parameter, on whose device other tensors are.

    Raises:
        FireflyError: If the optimizer keeps something else.
    """
    forms = entries.get(FORMS, {})
    parts = {f"{key}.{part}" for key, form in forms.items() for part in form["parts"]}
    keys = [key for key in (*entries, *forms) if key != FORMS and key not in parts]
    return {key: _put_together(key, entries, forms, kept.get(key), parameter) for key in keys}


def check_shapes(name: str, state: Mapping[str, Any], kept: Mapping[str, Any], parameter: Tensor) -> None:
    """Checks that the tensors of a state have the shapes that an optimizer keeps of a parameter.

    Args:
        name: Name of the parameter.
        state: The state, as :func:`put_together` gives it.
        kept: What the optimizer keeps for such a parameter, as :func:`kept_for` gives it.
        parameter: The parameter.

    Raises:
        FireflyError: If a tensor has another shape.
    """
    for key, value in state.items():
        model = kept.get(key)
        if not (isinstance(value, Tensor) and isinstance(model, Tensor) and _is_plain(model)):
            continue
        fits = value.dim() == model.dim() and all(
            _fits(size, tried, parameter) for size, tried in zip(value.shape, model.shape, strict=True)
        )
        if not fits:
            raise FireflyError(
                f"the checkpoint's optimizer keeps {key} of {name} with the sizes {tuple(value.shape)}, which do not "
                f"fit {tuple(parameter.shape)}; use an earlier checkpoint"
            )


def kept_for(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any] | None:
    """What an optimizer keeps for a parameter, found by a trial step on a smaller one; None where that step fails.

    Args:
        optimizer: The optimizer, which stays as it is.
        group: The optimizer's group that the parameter is in.
        parameter: The parameter, or one like it.
    """
    if state := optimizer.state.get(parameter):
        return dict(state)
    shape = (_tried_rows(parameter), *parameter.shape[1:]) if parameter.dim() else ()
    example = Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    example.grad = torch.zeros_like(example)
    trial = on_other_parameters(optimizer, [{**group, "params": [example]}])
    try:
        with uncompiled():
            trial.step()
    except Exception:  # of any type: a closure or a state of its constructor is missing
        return None
    return dict(trial.state[example])


def on_other_parameters(
    optimizer: Optimizer, groups: list[dict[str, Any]], state: MutableMapping[Any, Any] | None = None
) -> Optimizer:
    """An optimizer that is like another one in all but its parameters.

    Args:
        optimizer: The other one. What is neither group nor state is shared with it.
        groups: Groups of the new one, with all their settings.
        state: States of the new one; by default none.
    """
    other: Optimizer
    if hasattr(type(optimizer), "__del__"):  # frees what both would share, as DeepSpeed's Adam does in C++
        known = signature(type(optimizer)).parameters
        other = type(optimizer)(groups, **{name: value for name, value in optimizer.defaults.items() if name in known})
    else:
        other = object.__new__(type(optimizer))
        patched = ("step", "load_state_dict")  # those of this very object: a schedule counts its steps
        vars(other).update({name: value for name, value in vars(optimizer).items() if name not in patched})
        other.param_groups = groups
    other.state = defaultdict(dict) if state is None else state  # type: ignore[assignment]
    return other


@contextmanager
def uncompiled() -> Iterator[None]:
    """Lets optimizers that compile their step, as torchao's do, compute a trial step without that: it takes seconds."""
    compile_function = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _take_apart(key: str, value: Any, entries: dict[str, Any], forms: dict[str, dict[str, Any]]) -> None:
    parts: Mapping[Any, Any]
    if value is None or isinstance(value, bool | int | float | str) or _is_plain(value):
        entries[key] = value
        return
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        parts = {name: getattr(value, name) for name in names}
        of_class = {"context": context, "shape": list(value.shape), "stride": list(value.stride())}
        forms[key] = {"kind": type(value).__name__, "parts": list(parts), **of_class}
    elif type(value) in (dict, list, tuple):
        parts = value if isinstance(value, dict) else dict(enumerate(value))
        forms[key] = {"kind": type(value).__name__, "parts": list(parts)}
    else:
        raise FireflyError(f"keeps a {type(value).__name__} as {key} of a weight")
    for name, part in parts.items():
        _take_apart(f"{key}.{name}", part, entries, forms)


def _tried_rows(parameter: Tensor) -> int:
    """Rows of the parameter of a trial step; with the same remainder, since blocks may have to divide a parameter."""
    rows = len(parameter)
    return SMALL_ROWS + rows % SMALL_ROWS if parameter.dim() > 1 and rows > 2 * SMALL_ROWS else rows


def _fits(size: int, tried: int, parameter: Tensor) -> bool:
    """Whether a size of a state is that of the trial step's, for a parameter that may have more rows.

    It may be a number of rows, or of blocks of so many numbers, the last of which need not be full.
    """
    if size == tried or not parameter.dim():
        return size == tried
    rows, tried_rows = len(parameter), _tried_rows(parameter)
    return rows != tried_rows and (size == rows or abs(size * tried_rows / rows - tried) <= 1)


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, Parameter) and value.layout is torch.strided and not value.is_complex()


def _put_together(key: str, entries: Mapping[str, Any], forms: Mapping[str, Any], kept: Any, parameter: Tensor) -> Any:
    if key not in forms:
        return _like(entries[key], kept, parameter)
    form = forms[key]
    kind, names = form["kind"], form["parts"]
    inner = kept if isinstance(kept, dict) else dict(enumerate(kept)) if isinstance(kept, list | tuple) else {}
    parts = {name: _put_together(f"{key}.{name}", entries, forms, inner.get(name), parameter) for name in names}
    if kind in ("dict", "list", "tuple"):
        return parts if kind == "dict" else (list if kind == "list" else tuple)(parts.values())
    if type(kept).__name__ != kind:
        raise FireflyError(f"the checkpoint's optimizer keeps a {kind} as {key} of a weight, this one does not")
    return type(kept).__tensor_unflatten__(parts, form["context"], torch.Size(form["shape"]), tuple(form["stride"]))


def _like(value: Any, kept: Any, parameter: Tensor) -> Any:
    """A copy of a value as an optimizer keeps it: one that is mapped would keep a replaced checkpoint on the disk."""
    if not isinstance(value, Tensor):  # another strategy's optimizer of the same kind may count in tensors
        return kept.new_tensor(value) if isinstance(kept, Tensor) and isinstance(value, int | float) else value
    if isinstance(kept, int | float) and not value.dim():
        return type(kept)(value)
    if isinstance(kept, Tensor):
        casts = value.is_floating_point() and kept.is_floating_point() and _is_plain(kept)
        return value.to(kept.device, kept.dtype if casts else value.dtype, copy=True)
    return value.to(parameter.device, copy=True) if value.dim() else value


def keys_kept(entries: Mapping[str, Any]) -> set[str]:
    """Keys of what has dimensions in entries, as :func:`taken_apart` gives them."""
    return {key for key, value in entries.items() if not is_scalar(value)}
