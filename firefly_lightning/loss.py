"""The loss: cross-entropy on target tokens, and on nothing else."""

import torch.nn.functional as F
from torch import Tensor, nn


def target_cross_entropy(hidden: Tensor, head: nn.Module, target_positions: Tensor, target_ids: Tensor) -> Tensor:
    """Summed negative log-likelihood of the targets; logits exist at their positions only.

    A vocabulary is tens of times wider than the hidden states, and half of all positions belong to inputs and padding.

    Args:
        hidden: (rows, length, hidden_size), the last hidden states.
        head: Maps hidden_size to vocabulary.
        target_positions: (targets,) positions in the flattened (rows · length) whose next token is learned.
        target_ids: (targets,) those tokens.

    Returns:
        A scalar in float32; 0, with zero gradients, where there is no target.
    """
    logits = head(hidden.flatten(0, 1).index_select(0, target_positions))
    return F.cross_entropy(logits.float(), target_ids, reduction="sum")
