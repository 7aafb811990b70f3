"""The loss of a Bloom by Hugging Face's own forward pass, in place of :mod:`firefly_lightning.model.fast_bloom`."""

from typing import Any

from torch import Tensor

from firefly_lightning.data.batches import MicroBatch
from firefly_lightning.model.loss import TargetScores, target_cross_entropy, target_log_probs, target_scores


class StockPass:
    """Computes what :class:`FastBloom` computes, with the whole stock pass.

    Args:
        module: The module around the stock model, its ``model`` once it is loaded; called with token ids and attention
            mask, it gives the last hidden states, (rows, length, hidden_size).
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def target_loss(self, batch: MicroBatch) -> Tensor:
        """Summed negative log-likelihood of a micro-batch's targets, a scalar in float32."""
        return target_cross_entropy(self._at_targets(batch), self._module.model.lm_head, batch["target_ids"])

    def target_scores(self, batch: MicroBatch) -> TargetScores:
        """How each target of a micro-batch was predicted, without gradients."""
        return target_scores(self._at_targets(batch), self._module.model.lm_head, batch["target_ids"])

    def target_log_probs(self, batch: MicroBatch) -> Tensor:
        """Log-probability of each target of a micro-batch, (targets,) in float32, with gradients."""
        return target_log_probs(self._at_targets(batch), self._module.model.lm_head, batch["target_ids"])

    def _at_targets(self, batch: MicroBatch) -> Tensor:
        hidden: Tensor = self._module(batch["input_ids"], batch["attention_mask"]).flatten(0, 1)
        return hidden.index_select(0, batch["target_positions"])
