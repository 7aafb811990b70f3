"""Which weights decay, and which of an adapter's learn faster, are those of transformers and peft."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW
from transformers import Trainer

from firefly_lightning import AtomicCheckpointIO, FireflyError, FireflyModule
from firefly_lightning.optim import cosine_schedule
from firefly_lightning.optim.groups import decaying_names, make_in_groups
from tests.support.small_runs import train


def adamw(parameters) -> AdamW:
    return AdamW(parameters, 1e-2, weight_decay=0.0)


def test_what_decays_is_what_decays_in_transformers(bloom):
    assert decaying_names(bloom) == in_transformers(bloom)


def test_what_decays_of_an_adapter_is_what_decays_in_transformers(tiny_folder):
    model = lora(tiny_folder)
    assert decaying_names(model) == in_transformers(model)


def in_transformers(model: nn.Module) -> set[str]:
    """What transformers names, without the second name of the tied head."""
    return set(Trainer.get_decay_parameter_names(None, model)) & dict(model.named_parameters()).keys()


def test_without_decay_there_is_one_group_of_all_parameters_in_order(bloom):
    (group,) = make_in_groups(adamw, bloom).param_groups
    assert list(map(id, group["params"])) == list(map(id, bloom.parameters()))


def test_groups_decay_as_said(bloom):
    decaying, others = make_in_groups(adamw, bloom, 0.1).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in bloom.named_parameters()}
    assert {names[id(each)] for each in decaying["params"]} == in_transformers(bloom)
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_what_has_no_decay_is_refused(bloom):
    with pytest.raises(FireflyError, match=r"model\.weight_decay: Rprop has no weight decay; leave it out"):
        make_in_groups(torch.optim.Rprop, bloom, 0.1)


def lora(folder) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import BloomForCausalLM

    return get_peft_model(BloomForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["query_key_value"]))


def test_lora_plus_is_that_of_peft(tiny_folder):
    """Rates of all that is trained; peft lists them in another order."""
    from peft.optimizers import create_loraplus_optimizer

    model = lora(tiny_folder)
    expected = create_loraplus_optimizer(model, AdamW, lr=1e-2, loraplus_lr_ratio=16.0)
    found = make_in_groups(adamw, model, lora_plus=16.0, trained_only=True)
    assert rates(found) == rates(expected)
    assert len(set(rates(found).values())) == 2


def rates(optimizer) -> dict[int, float]:
    return {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}


def test_lora_plus_needs_an_adapter(bloom, tiny_folder, short_rows, tmp_path):
    with pytest.raises(FireflyError, match=r"model\.loraplus_lr_ratio: the model has no LoRA"):
        make_in_groups(adamw, bloom, lora_plus=4.0)
    module = FireflyModule(str(tiny_folder), loraplus_lr_ratio=4.0)
    with pytest.raises(FireflyError, match=r"model\.loraplus_lr_ratio: is for the matrices of an adapter"):
        train(tiny_folder, short_rows, tmp_path, module=module, max_steps=1)


def falling(optimizer):
    return cosine_schedule(optimizer, 2, 6)


@pytest.mark.parametrize("portable", [True, False])
def test_a_run_goes_on_in_other_groups(tiny_folder, short_rows, tmp_path, portable):
    """A checkpoint of one group resumes with two, whose decay is too small to show, and the other way round."""
    make = lambda decay: FireflyModule(str(tiny_folder), learning_rate=1e-2, lr_scheduler=falling, weight_decay=decay)  # noqa: E731
    own = lambda: {"plugins": [AtomicCheckpointIO(portable)], "data": {"micro_batch_size": 8}}  # noqa: E731
    whole = train(tiny_folder, short_rows, tmp_path / "whole", module=make(0.0), max_steps=6, **own())
    root, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    train(tiny_folder, short_rows, root, module=make(0.0), max_steps=2, **own())
    resumed = train(tiny_folder, short_rows, root, module=make(1e-30), ckpt_path=last, max_steps=4, every=1, **own())
    newest = max((root / "checkpoints").glob("last*"), key=lambda path: path.stat().st_mtime)
    back = train(tiny_folder, short_rows, root, module=make(0.0), ckpt_path=newest, max_steps=6, **own())
    assert resumed.losses | back.losses == {step: loss for step, loss in whole.losses.items() if step >= 2}
    assert resumed.rates | back.rates == {step: rate for step, rate in whole.rates.items() if step >= 2}


def test_decay_shrinks_matrices_alone(tiny_folder, short_rows, tmp_path):
    """Without a gradient AdamW only decays: by lr × decay, Loshchilov and Hutter, 2019, equation 12."""
    weight, bias = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    module = nn.Linear(2, 2)
    module.weight, module.bias = weight, bias
    optimizer = make_in_groups(adamw, module, 0.5)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 1 - 1e-2 * 0.5))
    assert torch.equal(bias, torch.ones(2))
