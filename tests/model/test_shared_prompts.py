"""Pairs whose beginnings are computed once give the log-probabilities and gradients of two whole rows."""

import copy

import numpy as np
import pytest
import torch
from transformers import BloomForCausalLM

from firefly_lightning.data.tokenized_rows import TokenizedRow
from firefly_lightning.model import attention
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.shared_prompts import SharedPrompts
from firefly_lightning.preference.pairs import TokenizedPair, collate_pairs, shared_prompts
from tests.support.pair_runs import labelled_pairs, row_log_prob


@pytest.fixture(scope="module")
def stock(model_folder) -> BloomForCausalLM:
    """Two blocks, six heads of eight: no power of two."""
    return BloomForCausalLM.from_pretrained(model_folder).float().train()


def as_row(labelled) -> TokenizedRow:
    ids, labels = labelled
    return TokenizedRow(np.array(ids, np.int32), np.array(labels) != -100)


@pytest.fixture(scope="module")
def pairs(model_folder, pairs_file):
    """Real pairs, and those that are awkward: one row begins the other, equal rows, only a start in common."""
    real = labelled_pairs(model_folder, pairs_file)[:6]
    (ids, labels), other = real[0]
    begins = (ids[:-2], labels[:-2])
    turned = [1, *reversed(other[0][1:])]
    apart = (turned, [-100 if label == -100 else token for token, label in zip(turned, other[1], strict=True)])
    return [*real, ((ids, labels), begins), (begins, (ids, labels)), ((ids, labels), (ids, labels)), (other, apart)]


def batch_of(pairs):
    return collate_pairs([TokenizedPair(as_row(chosen), as_row(rejected)) for chosen, rejected in pairs], 3)


def coefficients(batch) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(len(batch["target_ids"]))


def stock_gradients(stock, pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Row by row by stock Bloom: sums of log-probabilities, and gradients for a weight of each row."""
    model = copy.deepcopy(stock)
    sums = [row_log_prob(model, row)[0] for pair in pairs for row in pair]
    weights = row_weights(len(sums))
    sum(weight * value for weight, value in zip(weights, sums, strict=True)).backward()
    return torch.stack(sums).detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def row_weights(rows: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_log_probs_and_gradients_are_those_of_stock_bloom(shares, whole, recompute, stock, pairs):
    batch = batch_of(pairs)
    expected, grads = stock_gradients(stock, pairs)
    model = copy.deepcopy(stock)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = FastBloom(model, whole_weights=whole).target_log_probs(batch, shared_prompts(batch) if shares else None)
    sums = torch.zeros(2 * len(pairs)).index_add(0, batch["target_rows"], found)
    assert torch.allclose(sums, expected, rtol=1e-5, atol=1e-4)
    (sums * row_weights(len(sums))).sum().backward()
    for name, parameter in model.named_parameters():
        apart = float((parameter.grad - grads[name]).norm() / grads[name].norm())
        assert apart <= 1e-5, (name, apart)


def test_the_way_of_gpus_is_the_same_on_a_processor(stock, pairs, monkeypatch):
    batch, found = batch_of(pairs), {}

    def joined(contexts, dtype):
        return attention._join_padded(contexts, batch["shared_positions"]).to(dtype)

    for way in ("one by one", "padded"):
        if way == "padded":
            monkeypatch.setattr(
                SharedPrompts, "one_by_one", lambda self, split, bias, scores, kept: self.padded(split, bias, scores)
            )
            monkeypatch.setattr(attention, "_join_rows", joined)
        model = copy.deepcopy(stock)
        values = FastBloom(model).target_log_probs(batch, shared_prompts(batch))
        (values * coefficients(batch)).sum().backward()
        found[way] = values.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
    (values, grads), (padded, padded_grads) = found.values()
    assert torch.allclose(values, padded, atol=1e-5)
    for name, grad in grads.items():
        assert float((grad - padded_grads[name]).norm() / grad.norm()) <= 1e-5, name


def test_attention_never_crosses_from_one_answer_to_the_other(stock, pairs):
    """Another rejected answer leaves every log-probability of the chosen one as it is, to the last bit."""
    model = FastBloom(copy.deepcopy(stock).eval())
    (chosen, rejected), values = pairs[0], []
    for ids in (rejected[0], [*rejected[0][:-3], 7, 8, 2]):
        batch = batch_of([(chosen, (ids, rejected[1]))])
        with torch.no_grad():
            found = model.target_log_probs(batch, shared_prompts(batch))
        values.append(found[batch["target_rows"] == 0])
    assert torch.equal(*values)


@pytest.mark.parametrize("shares", [False, True])
def test_bfloat16_is_near(shares, stock, pairs):
    """Queries, keys and values are then kept in the narrower type."""
    batch = batch_of(pairs)
    expected, grads = stock_gradients(stock, pairs)
    model = copy.deepcopy(stock)
    with torch.autocast("cpu", torch.bfloat16):
        found = FastBloom(model).target_log_probs(batch, shared_prompts(batch) if shares else None)
    sums = torch.zeros(2 * len(pairs)).index_add(0, batch["target_rows"], found)
    assert torch.allclose(sums, expected, rtol=2e-2, atol=0.1)
    (sums * row_weights(len(sums))).sum().backward()
    for name, parameter in model.named_parameters():
        assert float((parameter.grad.float() - grads[name]).norm() / grads[name].norm()) <= 6e-2, name


def test_no_pairs_give_no_log_probs_and_gradients_of_zero(stock):
    model, batch = copy.deepcopy(stock), collate_pairs([], 3)
    FastBloom(model).target_log_probs(batch, shared_prompts(batch)).sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())
