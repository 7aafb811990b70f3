"""Metrics over target tokens, synchronised over ranks by torchmetrics."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TargetLoss(Metric):  # type: ignore[misc]
    """Mean negative log-likelihood of target tokens, in nats, over all of them and by kind.

    Tokens count alike, in float64; a value that is not finite shows in the result. (torchmetrics' MeanMetric either
    drops such values or, with ``nan_strategy="disable"``, ignores the weights: seen in 1.9.0.)

    Args:
        kinds: Names of the kinds, in the order of their numbers, the same on every rank.
    """

    full_state_update = False
    nll: Tensor
    targets: Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = list(kinds)
        self.set_dtype(torch.float64)
        self.add_state("nll", torch.zeros(len(kinds), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(len(kinds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nlls: Tensor, kinds: Tensor) -> None:
        """Adds target tokens.

        Args:
            nlls: (targets,) negative log-likelihood of each.
            kinds: (targets,) the number of the kind that each is of.
        """
        self.nll.index_add_(0, kinds, nlls.detach().to(torch.float64))
        self.targets.index_add_(0, kinds, torch.ones_like(kinds))

    def compute(self) -> dict[str | None, Tensor]:
        """The mean by kind, for those that had targets; that over all targets under None."""
        means: dict[str | None, Tensor] = {None: self.nll.sum() / self.targets.sum()}
        for kind, nll, count in zip(self.kinds, self.nll, self.targets.tolist(), strict=True):
            if count:
                means[kind] = nll / count
        return means
