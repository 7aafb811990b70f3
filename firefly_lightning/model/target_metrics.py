"""Metrics over target tokens, synchronised over ranks by torchmetrics."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from firefly_lightning.model.loss import TargetScores
from firefly_lightning.model.metric_names import of_kind


class TargetMetrics(Metric):  # type: ignore[misc]
    """How target tokens were predicted, over all of them and by kind.

    Every token counts the same, and sums are in float64; a value that is not finite shows in the result. (torchmetrics'
    MeanMetric either drops such values or, with ``nan_strategy="disable"``, ignores the weights: seen in 1.9.0.)

    Args:
        kinds: Names of the kinds, in the order of their numbers, the same on every rank.
    """

    full_state_update = False
    nll: Tensor
    targets: Tensor
    hits: Tensor
    closings: Tensor
    closing_hits: Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = list(kinds)
        self.set_dtype(torch.float64)
        self.add_state("nll", torch.zeros(len(kinds), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("targets", "hits", "closings", "closing_hits"):
            self.add_state(name, torch.zeros(len(kinds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: TargetScores, kinds: Tensor, closing: Tensor) -> None:
        """Adds target tokens.

        Args:
            scores: How each target token was predicted.
            kinds: (targets,) number of the kind of each target token.
            closing: (targets,) whether the target token is the ``</s>`` that ends its row.
        """
        self.nll.index_add_(0, kinds, scores.nlls.detach().to(torch.float64))
        self.targets.index_add_(0, kinds, torch.ones_like(kinds))
        for state, counted in (
            (self.hits, scores.hits),
            (self.closings, closing),
            (self.closing_hits, scores.hits & closing),
        ):
            state.index_add_(0, kinds, counted.long())

    def compute(self) -> dict[str, Tensor]:
        """Metrics over all targets, such as ``accuracy``, and of each kind with targets: ``accuracy_of/Couplet``.

        ``loss`` is the mean negative log-likelihood in nats, over all targets only; ``perplexity`` is its exponential;
        ``accuracy`` is the share of targets than which no token is likelier; ``eos_accuracy`` is that share among the
        targets that are the ``</s>`` which ends a row.
        """
        found = {"loss": self.nll.sum() / self.targets.sum()}
        for name, sums, counts in (
            ("perplexity", self.nll, self.targets),
            ("accuracy", self.hits, self.targets),
            ("eos_accuracy", self.closing_hits, self.closings),
        ):
            keys = [name, *(of_kind(name, kind) for kind in self.kinds)]
            both = (torch.cat([state.sum()[None], state]) for state in (sums, counts))
            for key, total, count in zip(keys, *both, strict=True):
                if count:
                    mean = total.double() / count
                    found[key] = mean.exp() if name == "perplexity" else mean
        return found
