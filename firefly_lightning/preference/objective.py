"""What is learned of a pair: the losses of DPO and IPO, from log-probabilities of both answers.

Sources: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023 (DPO);
Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023 (label smoothing); Azar et al., "A
General Theoretical Paradigm to Understand Learning from Human Preferences", 2023 (IPO).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceLoss = Literal["sigmoid", "ipo"]
"""The loss of a pair: ``sigmoid`` is that of DPO, ``ipo`` that of IPO."""


class AnswerLogProbs(NamedTuple):
    """Log-probabilities of the two answers of pairs under one model.

    Attributes:
        sums: (pairs, 2) sum over the tokens of the chosen and of the rejected answer, in nats.
        tokens: (pairs, 2) number of these tokens.
    """

    sums: Tensor
    tokens: Tensor


class PairScores(NamedTuple):
    """How pairs were judged.

    Attributes:
        losses: (pairs,) loss of each pair.
        rewards: (pairs, 2) rewards of the chosen and of the rejected answer, without gradients: ``beta`` times by how
            much the sum of the answer's log-probabilities is higher than the reference's.
    """

    losses: Tensor
    rewards: Tensor


def answer_log_probs(log_probs: Tensor, target_rows: Tensor, pairs: int) -> AnswerLogProbs:
    """Adds up the log-probabilities of tokens by answer.

    Args:
        log_probs: (targets,) log-probability of each target.
        target_rows: (targets,) which row of pairs each target belongs to; the chosen one of a pair comes first.
        pairs: Number of pairs.
    """
    sums = log_probs.new_zeros(2 * pairs).index_add(0, target_rows, log_probs)
    tokens = torch.zeros_like(sums).index_add(0, target_rows, torch.ones_like(log_probs))
    return AnswerLogProbs(sums.view(-1, 2), tokens.view(-1, 2))


def pair_scores(
    policy: AnswerLogProbs, reference: Tensor, loss: PreferenceLoss, beta: float, label_smoothing: float = 0.0
) -> PairScores:
    """Losses and rewards of pairs.

    With r the chosen answer's log-ratio of policy and reference minus the rejected one's, DPO's loss is
    -(1 - s) log sigmoid(beta r) - s log sigmoid(-beta r), s being ``label_smoothing``. With log-ratios that are means
    over an answer's tokens, as TRL takes them, IPO's is (r - 1 / (2 beta))².

    Args:
        policy: Log-probabilities under the model that learns.
        reference: (pairs, 2) sums of log-probabilities under the reference.
        loss: Which loss.
        beta: Strength with which the model is held to the reference.
        label_smoothing: Probability that the two answers of a pair are exchanged by mistake; for ``sigmoid`` only.
    """
    ratios = policy.sums - reference
    if loss == "ipo":
        chosen, rejected = (ratios / policy.tokens).unbind(1)
        losses = (chosen - rejected - 1 / (2 * beta)).square()
    else:
        apart = ratios[:, 0] - ratios[:, 1]
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * apart) - label_smoothing * F.logsigmoid(-beta * apart)
    return PairScores(losses, beta * ratios.detach())


def figures_of(policy: AnswerLogProbs, scores: PairScores) -> dict[str, Tensor]:
    """What is logged of pairs, (pairs,) by name; the mean over pairs is the metric.

    ``reward_accuracy`` is whether the chosen answer has the higher reward, ``reward_margin`` by how much;
    ``chosen_log_prob`` and ``rejected_log_prob`` are the sums of log-probabilities of the answers under the model.
    """
    chosen, rejected = scores.rewards.unbind(1)
    sums = policy.sums.detach()
    return {
        "reward_accuracy": (chosen > rejected).to(sums.dtype),
        "reward_margin": chosen - rejected,
        "chosen_log_prob": sums[:, 0],
        "rejected_log_prob": sums[:, 1],
    }


FIGURES = ("reward_accuracy", "reward_margin", "chosen_log_prob", "rejected_log_prob")
"""Names of what :func:`figures_of` gives."""
