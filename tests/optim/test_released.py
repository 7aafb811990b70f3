"""Gradients that are released change no digit of a run, and are not in memory together."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from firefly_lightning import FireflyError, FireflyModule
from firefly_lightning.strategies.run_optimizer import check_can_release
from tests.support.choice import DIVIDED
from tests.support.helpers import memory_taken
from tests.support.optimizers import ALL, maker
from tests.support.small_runs import train

STEPS, STOP = 6, 3

OF_DIVIDED = ("AdamW", "Adafactor", "AdamW of 8 bits")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def run(folder, rows, root, released: bool, optimizer=None, **more):
    module = FireflyModule(
        str(folder), learning_rate=1e-2, warmup_steps=9, optimizer=optimizer, release_gradients=released,
        weight_decay=0.1, **more.pop("model", {}),
    )  # fmt: skip
    more = {"max_steps": STEPS, "data": {"micro_batch_size": 8}} | more
    return train(folder, rows, root, module=module, **more)


@pytest.mark.parametrize("name", [None, *(OF_DIVIDED if DIVIDED else ALL)])
def test_losses_rates_and_norms_are_those_of_a_run_that_keeps_gradients(tiny_folder, short_rows, tmp_path, name):
    if name and "foreach" in name:
        return  # the same update; foreach only says how many at a time
    optimizer = maker(name) if name else None
    kept = run(tiny_folder, short_rows, tmp_path / "kept", False, optimizer)
    released = run(tiny_folder, short_rows, tmp_path, True, optimizer, max_steps=STOP)
    assert released.losses == {step: loss for step, loss in kept.losses.items() if step < STOP}
    resumed = run(tiny_folder, short_rows, tmp_path, True, optimizer, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.losses == {step: loss for step, loss in kept.losses.items() if step >= STOP}
    assert resumed.rates == {step: rate for step, rate in kept.rates.items() if step >= STOP}


def test_with_recomputed_activations(tiny_folder, short_rows, tmp_path):
    """A layer is computed anew after the weights of those above it have changed."""
    model = {"gradient_checkpointing": True}
    kept = run(tiny_folder, short_rows, tmp_path / "kept", False)
    released = run(tiny_folder, short_rows, tmp_path, True, model=model)
    assert released.losses == kept.losses


class Norms(FireflyModule):
    """Keeps the norms that are logged."""

    def log(self, name, value, *args, **kwargs):
        if name == "grad_norm":
            self.norms = [*getattr(self, "norms", []), float(value)]
        super().log(name, value, *args, **kwargs)


def test_the_norm_is_that_of_all_gradients(tiny_folder, short_rows, tmp_path):
    modules = [Norms(str(tiny_folder), 1e-2, 2, release_gradients=released) for released in (False, True)]
    for module in modules:
        train(tiny_folder, short_rows, tmp_path, module=module, max_steps=3, data={"micro_batch_size": 8})
    kept, released = (module.norms for module in modules)
    assert len(kept) == 3
    assert released == pytest.approx(kept, rel=1e-6)


class Broken(FireflyModule):
    """A module whose loss, or the gradient of whose embedding alone, is not finite in a step."""

    def __init__(self, *args, what: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.what, self.before = what, {}

    def training_step(self, batch, batch_idx):
        if batch["step"] == 2:
            self.before = {name: each.detach().clone() for name, each in self.named_parameters()}
            weight = self.model.transformer.word_embeddings.weight
            if self.what == "gradient":
                weight.register_hook(lambda gradient: gradient * torch.nan)
            else:
                with torch.no_grad():
                    self.model.transformer.ln_f.bias.fill_(torch.inf)
                self.before = {name: each.detach().clone() for name, each in self.named_parameters()}
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("what", "said"), [("loss", "still those before it"), ("gradient", "not to be trusted")])
def test_what_is_not_finite_ends_the_run(tiny_folder, short_rows, tmp_path, what, said):
    """A loss before any weight is touched; a gradient after, since those that came before it were used at once."""
    module = Broken(str(tiny_folder), 1e-2, 2, release_gradients=True, what=what)
    with pytest.raises(FireflyError, match=f"step 2: loss .* the weights are {said}.* Rows: "):
        train(tiny_folder, short_rows, tmp_path, module=module, max_steps=4, data={"micro_batch_size": 8}, every=1)
    same = all(torch.equal(each, module.before[name]) for name, each in module.named_parameters())
    assert same is (what == "loss")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": {"micro_batch_size": 2}}, "a step adds up 4 micro-batches; set data.micro_batch_size higher"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val 1.0 needs all gradients at once"),
        ({"strategy": "ddp"}, "this strategy reduces or shards gradients; train on one device"),
    ],
)
def test_a_run_that_needs_gradients_together_is_refused(tiny_folder, short_rows, tmp_path, settings, said):
    with pytest.raises(FireflyError) as raised:
        run(tiny_folder, short_rows, tmp_path, True, **settings)
    assert str(raised.value).startswith(f"model.release_gradients: {said}")


def test_a_scaled_loss_is_refused():
    """What only a GPU has."""
    strategy = SingleDeviceStrategy("cpu")
    trainer = SimpleNamespace(
        strategy=strategy, accumulate_grad_batches=1, gradient_clip_val=None, precision="16-mixed"
    )
    with pytest.raises(FireflyError, match="16-mixed scales gradients and skips whole steps"):
        check_can_release(trainer)


def test_gradients_are_not_in_memory_together(tmp_path_factory, tokenizer, short_rows, tmp_path):
    """Of a model whose layers are most of it, SGD needs nothing but weights and gradients."""
    from tests.conftest import tiny_bloom

    folder = tmp_path_factory.mktemp("deep")
    model = tiny_bloom(hidden_size=256, n_layer=12, n_head=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gradients = 4 * sum(each.numel() for each in model.parameters())
    del model
    taken = {}
    for released in (False, True):
        with memory_taken(0.005, trims=True) as peak:
            run(
                folder,
                short_rows,
                tmp_path,
                released,
                lambda parameters: torch.optim.SGD(parameters, 1e-3),
                max_steps=3,
            )
        taken[released] = peak[0]
    assert taken[False] - taken[True] > 0.6 * gradients, (taken, gradients)
