"""Precision that an engine takes care of itself."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from typing_extensions import override


class EnginePrecision(Precision):
    """Leaves casting, scaling and clipping to an engine whose optimizer does all of it.

    Args:
        precision: Lightning's name of it.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Has the optimizer do it, which knows what gradients go through."""
        optimizer.backward(tensor)

    @override
    def optimizer_step(  # type: ignore[override]  # as all of Lightning's own
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Steps after, not around, the closure: the engine's optimizers take none."""
        loss = closure()
        self._after_closure(model, optimizer)
        optimizer.step()
        return loss

    @override
    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the optimizer clips in its step."""
