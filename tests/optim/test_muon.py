"""Muon takes the matrices of the layers and AdamW the rest; each computes what PyTorch's own does by itself."""

from copy import deepcopy

import pytest
import torch

from firefly_lightning.optim.muon import MuonWithAdamW, mark_embeddings
from tests.conftest import tiny_bloom
from tests.support.helpers import fit, logged
from tests.support.optimizers import HAS_MUON

if not HAS_MUON:
    pytest.skip("torch.optim.Muon is of PyTorch 2.9; test_rehearsal shows the refusal", allow_module_level=True)


def test_each_parameter_is_updated_as_by_pytorchs_own():
    model, other = tiny_bloom(), tiny_bloom()
    mark_embeddings(model)
    optimizer = MuonWithAdamW(model.parameters(), lr=1e-2, adamw_lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9))
    named = dict(other.named_parameters())
    matrices = {name for name, each in named.items() if each.dim() == 2 and ".h." in name}
    assert len(matrices) == 2 * 4, (
        "four linear layers in each of two blocks; the embedding is a matrix too, and no such"
    )
    muon = torch.optim.Muon([named[name] for name in matrices], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [each for name, each in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(rest, 1e-3, (0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(step)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
            for group in each.param_groups:
                group["lr"] *= 0.9  # as a schedule does
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_state_and_groups_go_through_a_state_dict():
    model = tiny_bloom()
    mark_embeddings(model)
    first, second = (MuonWithAdamW([{"params": list(model.parameters()), "weight_decay": 0.3}]) for _ in range(2))
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    first.step()
    second.load_state_dict(deepcopy(first.state_dict()))
    before = [each.detach().clone() for each in model.parameters()]
    first.step()
    after = [each.detach().clone() for each in model.parameters()]
    with torch.no_grad():
        for each, value in zip(model.parameters(), before, strict=True):
            each.copy_(value)
    second.step()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), after, strict=True))
    assert {group["weight_decay"] for group in second.param_groups} == {0.3}


def test_a_line_of_yaml_is_enough(tiny_folder, short_rows, tmp_path):
    own = [
        "--data.batch_size",
        8,
        "--model.warmup_steps",
        1,
        "--model.optimizer",
        "firefly_lightning.optim.MuonWithAdamW",
    ]
    fit(tiny_folder, short_rows, tmp_path, *own, "--model.optimizer.adamw_lr", 1e-3, "--trainer.max_steps", 3)
    losses, rates = logged(tmp_path), logged(tmp_path, "lr")
    assert len(set(losses.values())) == 3
    assert float(rates[1]) == 1e-3, "Muon's own"


def test_a_closure_is_called_with_gradients():
    weight = torch.nn.Parameter(torch.eye(3))
    optimizer = MuonWithAdamW([weight], lr=0.1)

    def closure():
        loss = weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    assert not torch.equal(weight, torch.eye(3))
