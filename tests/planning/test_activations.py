"""What a forward pass keeps, counted by autograd, is what the formulas say."""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.data.batches import collate
from firefly_lightning.data.tokenized_rows import TokenizedRow
from firefly_lightning.model import attention, fast_bloom
from firefly_lightning.model.adapters import Lora, as_config, compute_in, put
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.loss import target_cross_entropy
from firefly_lightning.planning.activations import activations, autocast_copies, fused_logits, plain_logits
from firefly_lightning.planning.runs import Load, ModelSize, Run, Trained
from firefly_lightning.planning.ways import lora_shapes

SIZES = {"vocab_size": 500, "hidden_size": 64, "n_layer": 3, "n_head": 4}
LENGTHS, TARGETS = (60, 50, 40), 10
LOAD = Load(150, 180, 60, 30)


class Kept:
    """Storages that autograd saves, each once, without the parameters."""

    def __init__(self, parameters) -> None:
        self.skipped = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.tensors = {}

    def hooks(self, pack, unpack):
        """Hooks of the model's own would hide from those around them what they keep."""

        def packed(tensor):
            kept = pack(tensor)
            return None if kept is None else self(kept)

        return saved_tensors_hooks(packed, unpack)

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.skipped:
            self.tensors[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def bytes(self) -> int:
        return sum(size for size, _ in self.tensors.values())


def batch():
    rows = [TokenizedRow(np.arange(n, dtype=np.int32) + 5, np.arange(n) >= n - TARGETS) for n in LENGTHS]
    return collate(rows, pad_id=3)


# An engine's model is in bfloat16 as a whole; one device has autocast.
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("auto", "32-true"),
        ("auto", "bf16-mixed"),
        ("zero1", "bf16-mixed"),
        ("zero3", "32-true"),
        ("zero3", "bf16-mixed"),
    ],
)
@pytest.mark.parametrize("recomputing", [False, True])
def test_what_the_backward_pass_needs(strategy, precision, recomputing, monkeypatch):
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(**SIZES)).train()
    autocast = strategy == "auto" and precision == "bf16-mixed"
    model = model.bfloat16() if strategy != "auto" and precision == "bf16-mixed" else model
    if recomputing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run = Run(ModelSize(**SIZES), strategy, 1, LOAD, 1, precision, recomputing, "cpu")
    kept = Kept(model.parameters())
    for part in (attention, fast_bloom):
        monkeypatch.setattr(part, "saved_tensors_hooks", kept.hooks)
    with (
        saved_tensors_hooks(kept, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        FastBloom(model, whole_weights=strategy != "zero3").target_loss(batch())
    numbers = 8 * (150 + 30)  # of tokens and targets, for embeddings and for picking targets
    # The loss knows the gradient of a whole head in its forward pass; of another, logits are kept.
    head = 500 * (30 * 4 if strategy == "zero3" else 64 * run.weight_bytes)
    # Recomputed blocks show autograd neither ALiBi's bias, padded to 64, nor autocast's copies, though both are there.
    beside = -4 * 64 * 64 * 4 if recomputing else autocast_copies(run)
    moments = 2 * (150 + 30) * run.weight_bytes  # mean and deviation of the norms before and behind the blocks
    assert kept.bytes() == pytest.approx(activations(run) + beside + numbers + moments + head, rel=0.005)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("recomputing", [False, True])
def test_what_the_backward_pass_needs_of_an_adapter(precision, recomputing, monkeypatch):
    torch.manual_seed(0)
    rank, sizes = 1, ModelSize(**SIZES)
    model = BloomForCausalLM(BloomConfig(**SIZES)).train()
    put(model, as_config(Lora(rank=rank)))
    model = model.bfloat16() if precision == "bf16-true" else model
    if precision == "bf16-mixed":
        compute_in(model, as_config("lora"), torch.bfloat16)
    if recomputing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = Kept(model.parameters())
    for part in (attention, fast_bloom):
        monkeypatch.setattr(part, "saved_tensors_hooks", kept.hooks)
    with (
        saved_tensors_hooks(kept, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        FastBloom(model).target_loss(batch())
    trained = Trained(adapter=lora_shapes(sizes, rank))
    run = Run(sizes, "auto", 1, LOAD, 1, precision, recomputing, "cpu", trained)
    beside = -4 * 64 * 64 * 4 if recomputing else 0
    # Beyond that, the first block keeps nothing of its first norm, whose input needs no gradient.
    first = 0 if recomputing else 150 * 64 * run.weight_bytes
    assert kept.bytes() == pytest.approx(activations(run) + beside - first, rel=0.02)


def test_all_logits_at_once_are_three_times_there():
    """Their logarithms are kept; the backward pass makes two gradients of their size before they go."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False)
    hidden = torch.randn(300, 64, requires_grad=True)
    kept = Kept(head.parameters())
    with saved_tensors_hooks(kept, lambda tensor: tensor):
        target_cross_entropy(hidden, head, torch.zeros(300, dtype=torch.long))
    run = Run(ModelSize(5000, 64, 1, 4), "zero3", 1, Load(300, 300, 300, 300))
    assert 3 * kept.bytes() == pytest.approx(plain_logits(run), rel=0.05)


def test_logits_in_chunks_stop_growing_with_the_targets():
    model = ModelSize(46145, 2048, 24, 16)
    few, many, most = (
        fused_logits(Run(model, "auto", 1, Load(targets, targets, 512, targets))) for targets in (100, 3000, 6000)
    )
    # 2^28 / (4 · 46,145) = 1,454 targets a chunk, of logits and of their logarithms, and the gradient of the head.
    chunk, head = 1454 * 46145 * 4, 46145 * 2048 * 4
    assert few == 2 * 100 * 46145 * 4 + head + 2 * 100 * 2048 * 4
    assert many == 2 * chunk + head + 2 * 3000 * 2048 * 4
    assert most - many == 2 * 3000 * 2048 * 4
