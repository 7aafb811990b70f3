"""A precision plugin for engines that cast, scale and clip by themselves."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from typing_extensions import override


class EnginePrecision(Precision):
    """Leaves casting, scaling and clipping to an engine whose optimizer does all of it.

    Args:
        precision: Lightning's name of the precision.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Has the optimizer run the backward pass, since it scales the loss and handles the gradients."""
        optimizer.backward(tensor)

    @override
    def optimizer_step(  # type: ignore[override]  # as Lightning's own plugins do
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Calls the closure before the step, since the engine's optimizers take no closure."""
        loss = closure()
        self._after_closure(model, optimizer)
        optimizer.step()
        return loss

    @override
    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the optimizer clips in its step."""
