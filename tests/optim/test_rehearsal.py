"""An optimizer that cannot train, or cannot be resumed, is refused in a line before any weights are loaded."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.optim import Optimizer

from firefly_lightning.errors import FireflyError
from firefly_lightning.optim.rehearsal import check_elementwise
from firefly_lightning.strategies.colossalai.booster import BoosterStrategy
from firefly_lightning.strategies.deepspeed.machine import cpu_adam
from firefly_lightning.strategies.deepspeed.strategy import ZeroStrategy
from tests.support.helpers import fit, one_line
from tests.support.optimizers import ALL, ELEMENTWISE, HAS_MUON, WHOLE, maker
from tests.support.readme import page


class Forgetful(torch.optim.SGD):
    """Keeps what it goes by where no checkpoint finds it."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 - 1 / self.count / 100)


class WithASet(torch.optim.SGD):
    """Keeps what is neither a tensor nor a plain value."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = {1, 2}


class NeedsAModel(Optimizer):
    def __init__(self, params, model) -> None:
        super().__init__(params, {"lr": 0.1})


class WithoutRate(Optimizer):
    def __init__(self, params) -> None:
        super().__init__(params, {})

    def step(self, closure=None):
        pass


HERE = "tests.optim.test_rehearsal."
REFUSED = {
    "torch.optim.LBFGS": "LBFGS cannot train this model (",
    "torch.optim.SparseAdam": "SparseAdam cannot train this model (SparseAdam does not support dense gradients",
    "transformers.Adafactor": "Adafactor has no learning rate (lr) to set; give it one",
    HERE + "Forgetful": "Forgetful goes on otherwise from a checkpoint, since it keeps more than states of weights; ",
    HERE + "WithASet": "no checkpoint can hold WithASet (keeps a set as seen of a weight); take another",
    HERE + "WithoutRate": "WithoutRate has no learning rate (lr) to set; give it one",
    **(
        {"torch.optim.Muon": "Muon is for matrices alone; take firefly_lightning.optim.MuonWithAdamW"}
        if HAS_MUON
        else {}
    ),
}
"""By class, how the message begins after the key."""


@pytest.fixture(scope="module")
def with_broken_weights(tiny_folder, tmp_path_factory):
    """The tiny model's folder with weights that cannot be loaded, so that a run that comes to load them says so."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    (folder / "model.safetensors").write_text("nothing that can be loaded")
    return folder


@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_train_is_refused(with_broken_weights, short_rows, tmp_path, path):
    own = ["--trainer.max_steps", 2, "--data.batch_size", 8, "--model.optimizer", path]
    line = one_line(fit(with_broken_weights, short_rows, tmp_path, *own, check=False))
    assert line.startswith(f"model.optimizer: {REFUSED[path]}"), line
    assert not (tmp_path / "checkpoints").exists()


def test_arguments_that_cannot_be_are_refused(with_broken_weights, short_rows, tmp_path):
    for path, arguments, part in (
        ("torch.optim.SGD", {"lr": -1.0}, "SGD: Invalid learning rate: -1.0"),
        (HERE + "NeedsAModel", {"model": 1}, "cannot train this model ("),
    ):
        given = json.dumps({"class_path": path, "init_args": arguments})
        own = ["--trainer.max_steps", 2, "--data.batch_size", 8, "--model.optimizer", given]
        assert part in one_line(fit(with_broken_weights, short_rows, tmp_path, *own, check=False))


def test_a_pytorch_without_muon_says_so(with_broken_weights, short_rows, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    own = ["--trainer.max_steps", 2, "--data.batch_size", 8, "--model.optimizer"]
    line = one_line(
        fit(with_broken_weights, short_rows, tmp_path, *own, "firefly_lightning.optim.MuonWithAdamW", check=False)
    )
    assert line == f"torch {torch.__version__} has no Muon; install torch 2.9 or later, or take AdamW"


@pytest.mark.parametrize("name", ALL)
def test_only_what_updates_each_number_by_itself_goes_with_parts_of_weights(name):
    if name in ELEMENTWISE:
        check_elementwise(maker(name))
    else:
        with pytest.raises(
            FireflyError, match=r"updates parts of weights, which \w+ cannot do as it does whole ones; take"
        ):
            check_elementwise(maker(name))


def test_both_kinds_are_tried():
    assert len(ELEMENTWISE) >= 13
    assert len(WHOLE) >= 7


SAYS = {"en": ("yes", "no", ", "), "zh": ("能", "不能", "、")}


@pytest.mark.parametrize("language", SAYS)
def test_the_documentation_says_which_optimizer_goes_where(language):
    yes, no, comma = SAYS[language]
    rows = re.findall(
        rf"^\| ([^|`]+) \| {yes} \| ({yes}|{no})[^|]* \| ({yes}|{no}) \|$", page("resuming", language), re.M
    )
    found = {name: (parts, adam) for names, parts, adam in rows for name in names.split(comma)}
    forms = {"AdamW, foreach", "AdamW, fused"}
    assert found.keys() - {"Adam", "Muon"} == ALL.keys() - forms - {"Muon"}
    for name, (parts, adam) in found.items():
        assert parts == (yes if name in ELEMENTWISE or name == "Adam" else no), name
        assert adam == (yes if name in ("AdamW", "Adam") else no), name


@pytest.mark.parametrize("name", ["AdamW", "Adam with amsgrad", "SGD", "Lion", "Adafactor"])
def test_colossalai_and_offloading_take_plain_adam_alone(name):
    optimizer = maker(name)([torch.nn.Parameter(torch.zeros(2))])
    checks = [lambda: BoosterStrategy.check_adam(SimpleNamespace(name="gemini"), optimizer)]
    if name != "AdamW":  # which DeepSpeed would compile
        checks.append(lambda: cpu_adam(optimizer))
    for check in checks:
        with (
            pytest.raises(FireflyError, match=r"take torch\.optim\.AdamW or Adam|leave it out")
            if name != "AdamW"
            else nullcontext()
        ):
            check()


def test_deepspeed_refuses_adagrad():
    """It would make another one, whose learning rate no schedule sets."""
    strategy = SimpleNamespace(_needs_cpu_adam=False)
    taken, refused = (maker(name)([torch.nn.Parameter(torch.zeros(2))]) for name in ("RMSprop", "Adagrad"))
    assert ZeroStrategy.convert_optimizer(strategy, taken) is taken
    with pytest.raises(FireflyError, match="DeepSpeed's Adagrad follows no schedule and no checkpoint; take RMSprop"):
        ZeroStrategy.convert_optimizer(strategy, refused)
