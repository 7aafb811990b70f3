"""Gradients that are not kept: each weight is updated as its gradient arrives, in the backward pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from firefly_lightning.optim.states import on_other_parameters


class ReleasedGradients:
    """Has an optimizer update each parameter when its gradient is whole, and drops the gradient then.

    The optimizer's own ``step`` finds no gradients afterwards, and changes nothing; schedules and counters go by it.

    Args:
        optimizer: An optimizer that updates each parameter by itself, whatever the others' gradients are.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._norms: list[Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, optimizer, number))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def norm(self) -> Tensor:
        """Euclidean norm of the gradients that have arrived since this was last called."""
        norms, self._norms = self._norms, []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def stop(self) -> None:
        """Leaves gradients to the optimizer's own step again."""
        for hook in self._hooks:
            hook.remove()

    def _update(self, optimizer: Optimizer, number: int, parameter: Any) -> None:
        self._norms.append(torch.linalg.vector_norm(parameter.grad))
        # The group as it is now: a schedule changes its learning rate.
        alone = on_other_parameters(
            optimizer, [{**optimizer.param_groups[number], "params": [parameter]}], optimizer.state
        )
        alone.step()
        parameter.grad = None
