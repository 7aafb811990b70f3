"""Metrics over pairs, by kind, synchronised over ranks by torchmetrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from firefly_lightning.evaluation.totals import ALL, EvaluationTotals
from firefly_lightning.model.metric_names import of_kind
from firefly_lightning.preference.objective import FIGURES


class PairMetrics(Metric):  # type: ignore[misc]
    """Means over pairs, of all and by kind; sums are in float64, and a value that is not finite shows in the result.

    Args:
        kinds: Names of the kinds, in the order of their numbers, the same on every rank.
    """

    full_state_update = False
    losses: Tensor
    pairs: Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = list(kinds)
        self.set_dtype(torch.float64)
        for name in ("losses", *FIGURES):
            self.add_state(name, torch.zeros(len(kinds), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros(len(kinds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, figures: Mapping[str, Tensor], kinds: Tensor) -> None:
        """Adds pairs.

        Args:
            losses: (pairs,) loss of each.
            figures: (pairs,) by name, see :func:`firefly_lightning.preference.objective.figures_of`.
            kinds: (pairs,) number of the kind of each.
        """
        self.pairs.index_add_(0, kinds, torch.ones_like(kinds))
        for name, values in {"losses": losses, **figures}.items():
            getattr(self, name).index_add_(0, kinds, values.detach().to(torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """``loss`` over all pairs, and the figures over all and of each kind: ``reward_margin_of/Couplet``."""
        found = {"loss": self.losses.sum() / self.pairs.sum()}
        for name in FIGURES:
            sums = getattr(self, name)
            found[name] = sums.sum() / self.pairs.sum()
            for kind, total, count in zip(self.kinds, sums, self.pairs, strict=True):
                if count:
                    found[of_kind(name, kind)] = total / count
        return found


class PairTotals(EvaluationTotals):
    """The totals of one pass over pairs; answers are scored as in every evaluation.

    Args:
        loader: The loader of the pairs.
        device: The device of the model.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        super().__init__(loader, device)
        self._pairs = PairMetrics(self.kinds or [ALL]).to(device)

    def add_pairs(self, losses: Tensor, figures: Mapping[str, Tensor], kinds: Tensor) -> None:
        """Adds the pairs of a micro-batch; arguments as for :meth:`PairMetrics.update`."""
        self._pairs.update(losses, figures, kinds)

    def target_metrics(self) -> dict[str, Tensor]:
        """Metrics of pairs by name, over all ranks."""
        metrics: dict[str, Tensor] = self._pairs.compute()
        return metrics
