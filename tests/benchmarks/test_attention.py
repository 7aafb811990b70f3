"""Ways to compute attention agree with the formula, whatever the lengths of rows."""

import pytest
import torch

from benchmarks.attention import ways

LENGTHS = [5, 1, 130, 17]


def by_the_formula(split: torch.Tensor, heads: int) -> torch.Tensor:
    """Contexts of each row in float64; the slopes of a power of two of heads are 2^(-8 i / heads)."""
    contexts = []
    for row in split.double().split(LENGTHS):
        query, key, value = row.unbind(2)
        distance = torch.arange(len(row))[None] - torch.arange(len(row))[:, None]
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        scores = torch.einsum("qhd,khd->hqk", query, key) / split.shape[-1] ** 0.5
        scores = (scores + slopes[:, None, None] * distance.double()).masked_fill(distance > 0, -torch.inf)
        contexts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(contexts)


@pytest.mark.parametrize("way", ["padded", "flex"])
def test_attention_is_that_of_the_formula(way):
    torch.manual_seed(0)
    split = torch.randn(sum(LENGTHS), 4, 3, 16)
    assert torch.allclose(ways(4)[way](split, LENGTHS).double(), by_the_formula(split, 4), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["padded", "flex"])
def test_gradients_are_those_of_the_formula(way):
    torch.manual_seed(0)
    split = torch.randn(sum(LENGTHS), 4, 3, 16, requires_grad=True)
    upward = torch.randn(sum(LENGTHS), 4, 16)
    (expected,) = torch.autograd.grad(by_the_formula(split, 4), split, upward.double())
    on_gpu = split.detach().cuda().requires_grad_()
    (given,) = torch.autograd.grad(ways(4)[way](on_gpu, LENGTHS), on_gpu, upward.cuda())
    assert torch.allclose(given.cpu(), expected, atol=1e-3)
