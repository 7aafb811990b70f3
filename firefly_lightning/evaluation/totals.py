"""The totals of one pass over rows: metrics of their target tokens, and scores of the answers to them."""

from typing import Any

import torch
from torch import Tensor

from firefly_lightning.data.batches import MicroBatch, closing_targets
from firefly_lightning.data.protocol import batches_of
from firefly_lightning.evaluation.answer_scores import AnswerScores
from firefly_lightning.evaluation.predictions import Prediction
from firefly_lightning.model.loss import TargetScores
from firefly_lightning.model.target_metrics import TargetMetrics

ALL = "all"
"""Name of the one kind that all rows have whose kinds are not known."""


class EvaluationTotals:
    """Adds up metrics and scores over micro-batches, by kind.

    Kinds are known only of rows that this project's data module loads; all other rows count as one kind.

    Args:
        loader: The loader of the rows.
        device: The device of the model.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.kinds = kinds_of(loader)
        self._device = device
        self._targets = TargetMetrics(self.kinds or [ALL]).to(device)
        self._answers = AnswerScores(self.kinds or [])

    def add_targets(self, batch: MicroBatch, scores: TargetScores, eos_token_id: int) -> None:
        """Adds the scores of a micro-batch's target tokens."""
        rows = batch["target_positions"] // batch["input_ids"].shape[1]
        kinds = torch.zeros_like(rows) if self.kinds is None else batch["kinds"].index_select(0, rows)
        self._targets.update(scores, kinds, closing_targets(batch, eos_token_id))

    def add_answers(self, predictions: list[Prediction]) -> None:
        """Adds answers to rows."""
        self._answers.update(predictions)

    def target_metrics(self) -> dict[str, Tensor]:
        """Metrics of target tokens by name, over all ranks."""
        metrics: dict[str, Tensor] = self._targets.compute()
        return metrics

    def answer_scores(self) -> dict[str, Tensor]:
        """Scores of answers by name and kind, over all ranks."""
        return self._answers.compute(self._device)


def kinds_of(loader: Any) -> list[str] | None:
    """Names of the kinds of a loader's rows; None where the rows are not this project's."""
    batches = batches_of(loader)
    return None if batches is None else batches.rows.kinds
