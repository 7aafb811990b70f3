"""The losses are those that the papers print, number by number."""

import math

import pytest
import torch

from firefly_lightning.preference.objective import AnswerLogProbs, answer_log_probs, figures_of, pair_scores

SUMS = [[-12.0, -30.0], [-8.5, -3.25], [-700.0, -40.0]]
TOKENS = [[4.0, 9.0], [2.0, 5.0], [100.0, 7.0]]
REFERENCE = [[-14.0, -28.0], [-7.0, -4.0], [-690.0, -44.0]]


def given() -> AnswerLogProbs:
    return AnswerLogProbs(torch.tensor(SUMS, requires_grad=True), torch.tensor(TOKENS))


def apart(number: int, per_token: bool) -> float:
    ratios = [
        (SUMS[number][side] - REFERENCE[number][side]) / (TOKENS[number][side] if per_token else 1) for side in (0, 1)
    ]
    return ratios[0] - ratios[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo(beta, smoothing):
    scores = pair_scores(given(), torch.tensor(REFERENCE), "sigmoid", beta, smoothing)
    for number, found in enumerate(scores.losses.tolist()):
        x = beta * apart(number, per_token=False)
        right, wrong = -math.log1p(math.exp(-x)), -math.log1p(math.exp(x))
        assert found == pytest.approx(-(1 - smoothing) * right - smoothing * wrong, rel=1e-6)


def test_ipo():
    scores = pair_scores(given(), torch.tensor(REFERENCE), "ipo", 0.5)
    for number, found in enumerate(scores.losses.tolist()):
        assert found == pytest.approx((apart(number, per_token=True) - 1) ** 2, rel=1e-6)


def test_figures():
    policy = given()
    figures = figures_of(policy, pair_scores(policy, torch.tensor(REFERENCE), "sigmoid", 0.1))
    assert figures["reward_accuracy"].tolist() == [1, 0, 0]
    assert figures["reward_margin"].tolist() == pytest.approx([0.1 * apart(number, False) for number in range(3)])
    assert figures["chosen_log_prob"].tolist() == [-12, -8.5, -700]
    assert figures["rejected_log_prob"].tolist() == [-30, -3.25, -40]
    assert not any(values.requires_grad for values in figures.values())


def test_a_far_gradient_is_finite():
    policy = AnswerLogProbs(torch.tensor([[-1e5, 0.0]], requires_grad=True), torch.ones(1, 2))
    scores = pair_scores(policy, torch.zeros(1, 2), "sigmoid", 1.0)
    scores.losses.sum().backward()
    assert policy.sums.grad.tolist() == [[-1, 1]]


def test_tokens_are_added_up_by_answer():
    found = answer_log_probs(torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([0, 0, 1, 3]), 2)
    assert found.sums.tolist() == [[-3, -4], [0, -8]]
    assert found.tokens.tolist() == [[2, 1], [0, 1]]
