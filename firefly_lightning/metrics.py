"""Metrics over target tokens, synchronised over ranks by torchmetrics."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TargetLoss(Metric):  # type: ignore[misc]
    """Mean negative log-likelihood of target tokens, in nats.

    Batches count by their tokens, in float64; a value that is not finite shows in the result. (torchmetrics' MeanMetric
    either drops such values or, with ``nan_strategy="disable"``, ignores the weights: seen in 1.9.0.)
    """

    full_state_update = False
    nll: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, targets: int) -> None:
        """Adds a batch.

        Args:
            nll: Summed negative log-likelihood of its targets.
            targets: Their number.
        """
        self.nll += nll.detach().to(torch.float64)
        self.targets += targets

    def compute(self) -> Tensor:
        """The mean over all targets."""
        return self.nll / self.targets
