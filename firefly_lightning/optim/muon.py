"""PyTorch's Muon for matrices, with PyTorch's AdamW for all that is none, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from firefly_lightning.errors import FireflyError
from firefly_lightning.optim.states import on_other_parameters

_MARK = "_is_embedding"
_OF_MUON = "of_muon"
"""Key of a group's setting: whether Muon updates the group, or AdamW."""


def mark_embeddings(module: nn.Module) -> None:
    """Marks the weights of embeddings and of a language model's head, which are matrices that Muon is not meant for."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) or name.rpartition(".")[2] == "lm_head":
            for parameter in part.parameters(recurse=False):
                setattr(parameter, _MARK, True)


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of the layers; AdamW for embeddings, head, biases and layer norms.

    Muon's steps are scaled as AdamW's are, so that both take learning rates and decays of the same size. Which matrices
    are embeddings and head, :func:`mark_embeddings` has said; :class:`~firefly_lightning.FireflyModule` calls it.

    Args:
        params: Parameters, or groups of them; a group may have settings of its own.
        lr: Learning rate of Muon, and of AdamW where ``adamw_lr`` is not given.
        adamw_lr: Learning rate of AdamW.
        weight_decay: Decoupled weight decay of both.
        momentum: Momentum of Muon.
        nesterov: Whether Muon's momentum is Nesterov's.
        ns_steps: Newton-Schulz iterations of Muon.
        adjust_lr_fn: How Muon's step depends on a matrix's shape, as ``torch.optim.Muon`` has it.
        betas: Coefficients of AdamW's moments.
        eps: Added to the denominator of AdamW.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; Liu et al., Muon is Scalable
    for LLM Training, 2025.

    Raises:
        FireflyError: If this PyTorch has no Muon.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise FireflyError(f"torch {torch.__version__} has no Muon; install torch 2.9 or later, or take AdamW")
        of_muon, of_adamw = _divided(list(params))
        muon: Any = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        made: list[Optimizer] = []
        if of_muon:
            made.append(torch.optim.Muon(of_muon, lr, weight_decay=weight_decay, **muon))
        if of_adamw:
            made.append(AdamW(of_adamw, lr if adamw_lr is None else adamw_lr, (betas[0], betas[1]), eps, weight_decay))
        self._made = made
        super().__init__(
            [group for optimizer in made for group in optimizer.param_groups], {"lr": lr, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates each parameter by the optimizer of its group.

        Args:
            closure: Computes the loss and its gradients anew, if given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._made:
            own = [group for group in self.param_groups if group[_OF_MUON] is not isinstance(optimizer, AdamW)]
            on_other_parameters(optimizer, own, self.state).step()
        return loss


def _divided(given: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the matrices for Muon, and of all other parameters, each with the settings of the group it is from."""
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    divided: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for group in groups:
        parameters = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        for place, matrices in ((0, True), (1, False)):
            own = [each for each in parameters if (each.dim() == 2 and not hasattr(each, _MARK)) is matrices]
            if own:
                divided[place].append({**group, "params": own, _OF_MUON: matrices})
    return divided
