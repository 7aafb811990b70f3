"""What can be written as an adapter, what is refused, and that the fast pass computes each as stock peft does."""

import copy
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from jsonargparse._util import NestedArg
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError
from firefly_lightning.model.adapters import (
    Lora,
    as_config,
    check_adapter,
    check_same,
    compute_in,
    config_of,
    fields_of,
    put,
)
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.loss import fused_target_cross_entropy
from firefly_lightning.model.neftune import Neftune
from tests.support.helpers import ROOT, raised_line

SAVES_MODULES = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 14)
"""Older releases of peft put no copy of a whole module into a model that is not theirs."""

LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

METHODS = {
    "lora": peft.LoraConfig(r=4, target_modules=LINEAR),
    "rslora": peft.LoraConfig(r=4, target_modules=LINEAR, use_rslora=True),
    "dora": peft.LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "biases": peft.LoraConfig(r=4, target_modules=["dense"], bias="all"),
    "all-linear": peft.LoraConfig(r=4, target_modules="all-linear"),
    "regular expression": peft.LoraConfig(r=4, target_modules=r".*\.1\.mlp\.dense_.*"),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "ln_f"]),
    "ia3": peft.IA3Config(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["dense"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["dense"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["dense"])
    if SAVES_MODULES
    else peft.OFTConfig(r=8, target_modules=["dense"]),
}
if SAVES_MODULES:
    METHODS["norms too"] = peft.LoraConfig(r=4, target_modules=["dense"], modules_to_save=["ln_f"])
LATER = {
    "BOFTConfig": {"boft_block_size": 4},
    "HRAConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 16},
    "C3AConfig": {"block_size": 8},
    "RandLoraConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "RoadConfig": {"group_size": 4},
    "HiraConfig": {"r": 4},
}
"""Methods that not every supported release of peft has."""
for method, options in LATER.items():
    if hasattr(peft, method):
        METHODS[method] = getattr(peft, method)(target_modules=LINEAR, **options)


def small(tied: bool = True) -> BloomForCausalLM:
    torch.manual_seed(1)
    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
    bloom = BloomForCausalLM(config)
    with torch.no_grad():
        for parameter in bloom.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return bloom


def batch_of(*lengths: int) -> dict:
    """Rows of random tokens of which all but the first are targets, packed and padded."""
    rows = [torch.randint(4, 300, (length,)) for length in lengths]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    positions = mask.flatten().nonzero().flatten()
    followed = torch.cat([torch.tensor([True] * (length - 1) + [False]) for length in lengths])
    return {
        "input_ids": padded, "attention_mask": mask, "lengths": list(lengths), "token_positions": positions,
        "packed_targets": followed.nonzero().flatten(), "target_ids": torch.cat([row[1:] for row in rows]),
    }  # fmt: skip


def disturb(bloom: nn.Module) -> None:
    """An adapter changes nothing at first; later it does."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bloom.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_fast_pass_computes_what_stock_peft_does(name, recomputing):
    bloom, batch = small(), batch_of(5, 9, 3)
    check_adapter(METHODS[name], bloom.config)
    torch.manual_seed(0)
    stock = peft.get_peft_model(copy.deepcopy(bloom), copy.deepcopy(METHODS[name]))
    put(bloom, METHODS[name])
    trained = [name for name, parameter in bloom.named_parameters() if parameter.requires_grad]
    assert trained == [
        name.removeprefix("base_model.model.")
        for name, parameter in stock.named_parameters()
        if parameter.requires_grad
    ]
    disturb(bloom), disturb(stock)
    logits = stock(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    expected.backward()
    if recomputing:
        bloom.gradient_checkpointing_enable({"use_reentrant": False})
    loss = FastBloom(bloom.train()).target_loss(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = dict(stock.named_parameters())
    for name, parameter in bloom.named_parameters():
        if parameter.requires_grad:
            gradient = gradients[f"base_model.model.{name}"].grad
            # Processors sum in other orders: of RandLora's many bases, 1.3e-4 was left on one.
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=3e-4)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize(
    ("name", "watched", "left"),
    [("lora", False, False), ("rslora", False, False), ("dora", False, True), ("lora", True, True)],
)
def test_only_a_plain_lora_nobody_looks_at_is_not_left_to_peft(name, watched, left, monkeypatch):
    bloom, seen, called = small(), [], []
    put(bloom, METHODS[name])
    layers = [part for part in bloom.modules() if isinstance(part, peft.tuners.lora.layer.Linear)]
    assert len(layers) == len(LINEAR) * bloom.config.n_layer
    own = peft.tuners.lora.layer.Linear.forward
    monkeypatch.setattr(
        peft.tuners.lora.layer.Linear, "forward", lambda layer, given: called.append(layer) or own(layer, given)
    )
    if watched:
        for layer in layers:
            layer.register_forward_hook(lambda layer, given, output: seen.append(layer))
    FastBloom(bloom.train()).target_loss(batch_of(5, 9))
    assert called == (layers if left else [])
    assert seen == (layers if watched else [])


def test_an_adapter_in_16_bits_has_the_same_results_in_half_the_memory():
    bloom, batch = small(), batch_of(5, 9, 3)
    put(bloom, METHODS["lora"])
    disturb(bloom)
    kept = copy.deepcopy(bloom)
    compute_in(kept, METHODS["lora"], torch.bfloat16)
    assert {p.dtype for name, p in kept.named_parameters() if ".base_layer." in name} == {torch.bfloat16}
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.float32}
    losses = []
    for model in (bloom, kept):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(FastBloom(model.train()).target_loss(batch))
        losses[-1].backward()
    assert losses[0] == losses[1]
    gradients = dict(kept.named_parameters())
    for name, parameter in bloom.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("hidden_learns", "head_learns"), [(True, False), (False, True), (True, True)])
def test_no_gradient_of_what_is_frozen_is_computed(hidden_learns, head_learns, monkeypatch):
    torch.manual_seed(0)
    hidden, head, ids = torch.randn(7, 16), torch.randn(300, 16), torch.randint(0, 300, (7,))
    hidden.requires_grad_(hidden_learns), head.requires_grad_(head_learns)
    products = []
    monkeypatch.setattr("firefly_lightning.model.loss._add_product", lambda *parts: products.append(parts))
    fused_target_cross_entropy(hidden, head, ids).backward()
    assert bool(products) is head_learns
    assert (hidden.grad is not None) is hidden_learns
    if hidden_learns:
        (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ head.t(), ids, reduction="sum"), hidden)
        torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("lorra", "model.adapter lorra: no adapter; write lora, keys of it (rank, alpha, dropout, target_modules)"),
        (
            {"rnk": 3},
            "model.adapter.rnk: no key of lora (rank, alpha, dropout, target_modules); an adapter of peft's own",
        ),
        ({"rank": 8, "alpha": "x"}, "model.adapter.alpha: x is not a number; write one such as 16"),
        ({"rank": True}, "model.adapter.rank: True is not a whole number; write one such as 8"),
        ({"target_modules": "dense"}, "model.adapter.target_modules: dense is not a list of names; write one"),
        (NestedArg("rank", "1.5"), "model.adapter.rank: 1.5 is not a whole number"),
        (NestedArg("lora_alpha", "3"), "model.adapter.lora_alpha: no key of lora"),
        (
            {"class_path": "peft.LoroConfig", "init_args": {"r": 3}},
            "model.adapter.class_path peft.LoroConfig: peft has no such configuration; did you mean Lo",
        ),
        (
            {"class_path": "peft.LoraConfig", "init_args": {"rang": 3}},
            "model.adapter.init_args.rang: no key of LoraConfig",
        ),
        (
            {"class_path": "peft.LoraConfig", "init_args": {"use_dra": True}},
            "model.adapter.init_args.use_dra: no key of LoraConfig; did you mean use_dora?",
        ),
        (
            {"class_path": "peft.LoraConfig", "init_args": {"r": "八"}},
            "model.adapter.init_args.r: 八 is not what LoraConfig takes there, int",
        ),
        (
            Namespace(class_path="peft.LoraConfig", init_args=Namespace(init_lora_weights="loftq")),
            "model.adapter.init_args: LoraConfig cannot be made of this (",
        ),
        (
            {"class_path": "peft.LoraConfig", "init_args": [3]},
            "model.adapter.init_args: LoraConfig is made of keys and",
        ),
        (Lora(rank=0), "model.adapter.rank is 0; it must be at least 1"),
        (Lora(dropout=1.5), "model.adapter.dropout is 1.5; it must be at least 0 and at most 0.999"),
        (Lora(alpha=0), "model.adapter.alpha is 0; it must be above 0"),
        (
            Lora(target_modules=["q_proj"]),
            "model.adapter: the model has no q_proj; its linear layers are dense, dense_4h",
        ),
        (Lora(target_modules=["dense", "densse"]), "model.adapter: the model has no densse"),
        (Lora(target_modules=[]), "model.adapter: "),
        (peft.LoraConfig(r=0), "model.adapter: peft cannot put it into a Bloom (`r` should be a positive"),
        (
            peft.LoraConfig(target_modules=r"nothing\d"),
            "model.adapter: peft cannot put it into a Bloom (Target modules",
        ),
        (
            peft.LoraConfig(modules_to_save=["lm_head"]),
            "model.adapter: trains lm_head.modules_to_save.default.weight, but"
            if SAVES_MODULES
            else "model.adapter: this release of peft passes over modules_to_save",
        ),
        (peft.LoraConfig(target_modules=["word_embeddings"]), "model.adapter: trains transformer.word_embeddings."),
        (peft.LoraConfig(init_lora_weights="pissa"), "model.adapter: init_lora_weights pissa changes the model's own"),
        (peft.LoraConfig(layer_replication=[[0, 1], [0, 1]]), "model.adapter: layer_replication makes another model"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4), "model.adapter: peft cannot put it into a Bloom"),
        (
            peft.AdaLoraConfig(target_modules=["dense"], total_step=9),
            "model.adapter: ADALORA must be told of every step",
        ),
        (
            peft.PolyConfig(target_modules=["dense"], r=2, n_tasks=2),
            "model.adapter: POLY must be told the task of each row",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(written, message):
    with pytest.raises(FireflyError) as raised:
        check_adapter(as_config(written), small().config)
    assert raised_line(raised).startswith(message)


def test_an_embedding_that_is_not_the_head_may_be_adapted():
    bloom, batch = small(tied=False), batch_of(4, 6)
    whole = {"modules_to_save": ["lm_head"]} if SAVES_MODULES else {}
    config = peft.LoraConfig(r=4, target_modules=["word_embeddings", "dense"], **whole)
    check_adapter(config, bloom.config)
    put(bloom, config)
    disturb(bloom)
    loss = FastBloom(bloom.train()).target_loss(batch)
    loss.backward()
    logits = bloom(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is not None for parameter in bloom.parameters() if parameter.requires_grad)


def test_fields_tell_the_adapter_and_its_changes():
    config = as_config("lora")
    again = config_of(fields_of(config))
    assert fields_of(again) == fields_of(config)
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (8, 16, set(LINEAR))
    check_same(fields_of(config), fields_of(as_config(Lora(dropout=0.1))))
    with pytest.raises(FireflyError, match=r"differs from the checkpoint's \(lora_alpha 16 → 32\)"):
        check_same(fields_of(config), fields_of(as_config(Lora(alpha=32))))
    with pytest.raises(FireflyError, match="the adapter's configuration cannot be used"):
        config_of({"peft_type": "LATER", "r": 8})


def test_fields_are_the_same_in_every_process():
    """peft keeps names in sets, whose order hangs on the seed of Python's hashes, which each process draws."""
    script = "from firefly_lightning.model.adapters import *; print(json.dumps(fields_of(as_config('lora'))))"
    told = {
        subprocess.check_output(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": str(seed)}, text=True, cwd=ROOT
        )
        for seed in range(3)
    }
    assert len(told) == 1
    fields = json.loads(told.pop())
    other_order = fields | {"target_modules": fields["target_modules"][::-1]}  # as in checkpoints so far
    check_same(other_order, fields)
    with pytest.raises(FireflyError, match="target_modules"):
        check_same(fields | {"target_modules": fields["target_modules"][1:]}, fields)


def test_noise_is_bounded_by_the_length_of_each_row_and_ends_with_the_step():
    """Bounds of Jain et al. (2023): alpha / √(length · hidden_size)."""
    seen = []
    bloom, batch, noise = small().train(), batch_of(4, 16), Neftune(5.0)
    noise.attach(bloom)
    bloom.transformer.word_embeddings_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fast = FastBloom(bloom)
    plain = fast.target_loss(batch)
    with noise.on(batch["lengths"]):
        noisy = fast.target_loss(batch)
        bloom.transformer(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert fast.target_loss(batch) == plain != noisy
    apart = (seen[1] - seen[0]).abs()
    for rows, length in ((apart[:4], 4), (apart[4:], 16)):
        bound = 5.0 / (length * 16) ** 0.5
        assert bound / 2 < rows.max() <= bound * 1.0001
    padded = (seen[2] - bloom.transformer.word_embeddings(batch["input_ids"])).abs()
    assert padded[0].max() <= 5.0 / (4 * 16) ** 0.5 * 1.0001
    assert padded[1].max() <= 5.0 / (16 * 16) ** 0.5 * 1.0001
