"""What any optimizer keeps of the weights that it updates, found by trial steps on small ones."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adafactor, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firefly_lightning.errors import FireflyError, reason

Shapes = Mapping[tuple[int, ...], int]
"""How many weights of each shape there are."""

SIDES = ((256, 512), (512, 1024))
"""Rows and columns of the trial matrices: whole blocks of the optimizers whose states are in blocks of 8 or 4 bits."""


@dataclass(frozen=True)
class OptimizerCost:
    """Memory of an optimizer.

    Attributes:
        matrix: Bytes of the states of a matrix: a constant, and bytes for each of its rows, columns and numbers.
        vector: Bytes of the states of a vector: a constant, and bytes for each of its numbers.
        workspace: Bytes for each number of a tensor that is updated, while it is.
        together: Whether PyTorch updates all tensors at once on a GPU, so that all have a workspace.
    """

    matrix: tuple[float, float, float, float]
    vector: tuple[float, float]
    workspace: float
    together: bool = False

    def states(self, shapes: Shapes) -> float:
        """Bytes of the states of weights of these shapes; more than two dimensions count as rows of the first."""
        return sum(count * self._of(shape) for shape, count in shapes.items())

    def _of(self, shape: tuple[int, ...]) -> float:
        if len(shape) < 2:
            return float(np.dot(self.vector, (1, math.prod(shape))))
        rows, columns = shape[0], math.prod(shape[1:])
        return float(np.dot(self.matrix, (1, rows, columns, rows * columns)))


def adamw(size: int) -> OptimizerCost:
    """PyTorch's AdamW, fused into one pass: two moments of ``size`` bytes a number, and no workspace."""
    return OptimizerCost((0.0, 0.0, 0.0, 2.0 * size), (0.0, 2.0 * size), 0.0)


def cost_of(make: Callable[[list[Parameter]], Optimizer], dtype: torch.dtype) -> OptimizerCost:
    """Finds the memory of an optimizer by trial steps.

    Bytes of states are linear in rows, columns and numbers: moments in numbers, Adafactor's factors in rows and
    columns. So four matrices tell those of any.

    Args:
        make: Makes the optimizer for parameters.
        dtype: Type of the weights.

    Raises:
        FireflyError: If the optimizer cannot be made, or take a step.
    """
    sides = list(product(*SIDES))
    try:
        found = [_tried(make, torch.zeros(side, dtype=dtype)) for side in sides]
        vectors = [_tried(make, torch.zeros(length, dtype=dtype)) for length in SIDES[1]]
    except FireflyError:
        raise
    except Exception as error:  # of any type: the optimizer is a user's
        raise FireflyError(f"model.optimizer: a trial step failed ({reason(error)}); it cannot be planned") from error
    known = [(1, rows, columns, rows * columns) for rows, columns in sides]
    matrix = np.linalg.solve(np.array(known, float), [states for states, _, _ in found])
    (first, *_), (second, *_) = vectors
    slope = (second - first) / (SIDES[1][1] - SIDES[1][0])
    workspace = max(spent / math.prod(side) for (_, spent, _), side in zip(found, sides, strict=True))
    return OptimizerCost(
        tuple(matrix.tolist()), (first - slope * SIDES[1][0], slope), workspace, all(each for *_, each in found)
    )


def _tried(make: Callable[[list[Parameter]], Optimizer], weight: Tensor) -> tuple[float, float, bool]:
    """Bytes of the states of a weight, the most that a step takes beside them, and whether a GPU takes all at once."""
    parameter = Parameter(weight)
    optimizer = make([parameter])
    for _ in range(2):  # the first makes the states
        parameter.grad = torch.ones_like(parameter)
        # An optimizer that PyTorch compiles keeps the same states uncompiled, and compiling takes a minute.
        with mock.patch.object(torch, "compile", side_effect=_as_it_is) as compiles, _Held() as held:
            optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    defaults = optimizer.defaults
    together = "foreach" in defaults and defaults["foreach"] is None and not defaults.get("fused")
    return (
        sum(map(_bytes, states)),
        0.0 if compiles.called else float(held.most),
        together and not isinstance(optimizer, Adafactor),
    )


def _as_it_is(function: Any, **options: Any) -> Any:
    return function


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes that were held at a time of tensors that were made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._uses: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(tensor) for tensor in tree_leaves((args, kwargs)) if type(tensor) in (Tensor, Parameter)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor and (_place(tensor) in self._uses or _place(tensor) not in given):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        place, size = _place(tensor), tensor.untyped_storage().nbytes()
        self._now += 0 if self._uses[place] else size
        self._uses[place] += 1
        self.most = max(self.most, self._now)
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._uses[place] -= 1
        if not self._uses[place]:
            del self._uses[place]
            self._now -= size


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(value: Any) -> float:
    """Bytes of a tensor, also of one that is made of others; 0 of anything else."""
    if not isinstance(value, Tensor):
        return 0.0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_bytes(getattr(value, name)) for name in names)
    return float(value.nbytes) if value.dim() else 0.0
