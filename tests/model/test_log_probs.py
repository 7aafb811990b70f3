"""Log-probabilities of targets in little memory are those of the plain function, with its gradients."""

import pytest
import torch
from torch import nn

from firefly_lightning.model import loss
from firefly_lightning.model.loss import fused_target_log_probs, target_log_probs

TARGETS, HIDDEN, VOCABULARY = 13, 5, 17


def made(dtype=torch.float64) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype), torch.randint(VOCABULARY, (TARGETS,))


@pytest.fixture(params=[1000, 5])
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss, "chunk_size", lambda *_: request.param)
    monkeypatch.setattr(loss, "SUMMED_ROWS", 4)


@pytest.mark.usefixtures("chunks")
def test_gradients_are_those_of_differences():
    hidden, head, ids = made()
    torch.autograd.gradcheck(lambda given, weight: fused_target_log_probs(given, weight, ids), (hidden, head.weight))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("trains", ["both", "hidden", "head", "none"])
def test_values_and_gradients_are_those_of_the_plain_function(trains):
    hidden, head, ids = made(torch.float32)
    hidden.requires_grad_(trains in ("both", "hidden"))
    head.weight.requires_grad_(trains in ("both", "head"))
    plain, fused = target_log_probs(hidden, head, ids), fused_target_log_probs(hidden, head.weight, ids)
    assert torch.allclose(fused, plain, atol=1e-6)
    inputs = [one for one in (hidden, head.weight) if one.requires_grad]
    if not inputs:
        assert not fused.requires_grad
        return
    coefficients = torch.randn(TARGETS)
    for found, expected in zip(
        torch.autograd.grad(fused, inputs, coefficients), torch.autograd.grad(plain, inputs, coefficients), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_frozen_head_costs_no_second_product(monkeypatch):
    hidden, head, ids = made(torch.float32)
    head.weight.requires_grad_(False)
    found = fused_target_log_probs(hidden, head.weight, ids)
    monkeypatch.setattr(loss, "at_least_float32", lambda values: pytest.fail("logits are computed again"))
    found.sum().backward()
    assert hidden.grad is not None


def test_no_targets_give_nothing_and_gradients_of_zero():
    hidden, head, ids = made(torch.float32)
    given = hidden[:0]
    found = fused_target_log_probs(given, head.weight, ids[:0])
    found.sum().backward()
    assert found.shape == (0,)
    assert not head.weight.grad.any()


def test_sums_of_a_half_precision_are_in_float32():
    hidden, head, ids = made(torch.bfloat16)
    found = fused_target_log_probs(hidden, head.weight, ids)
    assert found.dtype == torch.float32
    found.sum().backward()
    exact = target_log_probs(hidden.detach().double(), head.double(), ids)
    assert torch.allclose(found.double(), exact, atol=0.05)
