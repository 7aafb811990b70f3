"""Under every schedule a resumed run has the learning rates and momenta of a run that never stopped."""

import io
import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW, lr_scheduler
from transformers import Adafactor, optimization

from firefly_lightning import AtomicCheckpointIO, FireflyError, FireflyModule
from firefly_lightning.optim import check_counts_steps
from tests.support.schedules import OPTIMIZERS, STEPS, Run, assert_resumes
from tests.support.small_runs import train

OF_TORCH = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 1 - step / 100),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5, 5], 0.5),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.3, 6),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 8)],
        milestones=[4],
    ),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 8, 2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5, 1e-4),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 3),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 2),
}
"""By its name, each of PyTorch's schedules that count steps."""

OF_TRANSFORMERS = {
    "constant_with_warmup": {"num_warmup_steps": 3},
    "inverse_sqrt": {"num_warmup_steps": 3},
    "cosine_with_min_lr": {"scheduler_specific_kwargs": {"min_lr": 1e-4}},
    "cosine_warmup_with_min_lr": {"scheduler_specific_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"scheduler_specific_kwargs": {"num_decay_steps": 3, "num_stable_steps": 4}},
}
"""What some of transformers' schedules take beyond warm-up and length."""


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedules_of_torch(name, optimizer):
    assert_resumes(OPTIMIZERS[optimizer], OF_TORCH[name])


def test_every_schedule_of_torch_is_tried():
    assert {*OF_TORCH, "ReduceLROnPlateau", "LRScheduler"} == set(lr_scheduler.__all__)


def counting_steps() -> list[str]:
    """Names of transformers' schedules that count steps, and change the rate."""
    return [kind.value for kind in optimization.TYPE_TO_SCHEDULER_FUNCTION if kind.value not in ("constant", *METRICS)]


METRICS = ("reduce_lr_on_plateau", "greedy")
"""Those of transformers' schedules that follow a metric."""


def of_transformers(name: str):
    more = {"num_warmup_steps": 3, "num_training_steps": STEPS} | OF_TRANSFORMERS.get(name, {})
    return lambda optimizer: optimization.get_scheduler(name, optimizer, **more)


@pytest.mark.parametrize("name", counting_steps())
def test_schedules_of_transformers(name):
    assert_resumes(OPTIMIZERS["groups"], of_transformers(name))


def test_the_schedule_of_adafactor():
    make = lambda parameters: Adafactor(parameters, scale_parameter=False, relative_step=True, warmup_init=True)  # noqa: E731
    whole = Run(make, optimization.AdafactorSchedule)
    for _ in range(4):
        whole.step()
    resumed = Run(make, optimization.AdafactorSchedule, whole.saved(portable=False))
    assert resumed.step() == whole.step()


def test_a_schedule_of_a_users_own_that_follows_a_metric_goes_on():
    """Where a module of one's own says what the metric is; this project's module refuses it."""
    schedule = lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)  # noqa: E731
    assert_resumes(OPTIMIZERS["groups"], schedule, [3.0, 2.0, 2.5, 2.4, 2.0, 1.0, 1.5, 0.5, 0.9, 0.9, 0.4, 0.3])


class Halving:
    """A user's own schedule, which is none of PyTorch's classes and knows only what it saves."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] /= 2
            group["weight_decay"] = self.count / 10

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state) -> None:
        self.count = state["count"]


def test_a_schedule_of_a_users_own():
    assert_resumes(OPTIMIZERS["groups"], Halving)


def test_what_is_configured_anew_wins_over_the_checkpoint():
    """All but what the schedule has changed: half of the rate, another decay, and the momenta that were reached."""
    before = Run(lambda parameters: AdamW(parameters, 1e-3, weight_decay=0.1), OF_TORCH["CyclicLR"])
    for _ in range(4):
        before.step()
    (reached,) = before.optimizer.param_groups
    after = Run(lambda parameters: AdamW(parameters, 1e-3, weight_decay=0.2), OF_TORCH["CyclicLR"], before.saved(True))
    (found,) = after.optimizer.param_groups
    assert (found["weight_decay"], found["betas"], found["lr"]) == (0.2, reached["betas"], reached["lr"])
    before = Run(lambda parameters: AdamW(parameters, 1e-3), OF_TORCH["StepLR"])
    for _ in range(5):
        before.step()
    after = Run(lambda parameters: AdamW(parameters, 4e-3), OF_TORCH["StepLR"], before.saved(True))
    assert [used[0] for used in after.step()] == [4e-3 / 4]


def test_a_checkpoint_of_before_goes_on():
    """It does not say what schedules have changed."""
    before = Run(OPTIMIZERS["groups"], OF_TORCH["LinearLR"])
    for _ in range(4):
        before.step()
    saved = torch.load(io.BytesIO(before.saved(True)), weights_only=True)
    buffer = io.BytesIO()
    torch.save(saved | {"changed": []}, buffer)
    assert Run(OPTIMIZERS["groups"], OF_TORCH["LinearLR"], buffer.getvalue()).step() == before.step()


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", *METRICS])
def test_schedules_that_follow_a_metric_are_refused(name):
    make = lr_scheduler.ReduceLROnPlateau if name == "ReduceLROnPlateau" else of_transformers(name)
    try:
        schedule = make(AdamW([Parameter(torch.ones(1))]))
    except ValueError:
        pytest.skip("this release of transformers has no such schedule")
    with pytest.raises(FireflyError, match=r"model\.lr_scheduler: \w+ follows a metric"):
        check_counts_steps(schedule)


def test_a_run_refuses_such_a_schedule_before_it_loads_weights(tiny_folder, short_rows, tmp_path):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_folder / name).read_text())
    (tmp_path / "model.safetensors").write_text("nothing that can be loaded")
    module = FireflyModule(str(tmp_path), lr_scheduler=lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(FireflyError, match="ReduceLROnPlateau follows a metric"):
        train(tmp_path, short_rows, tmp_path, module=module, max_steps=2)


@pytest.mark.parametrize("portable", [True, False])
def test_a_run_under_a_cycle_of_momenta_goes_on(tiny_folder, short_rows, tmp_path, portable):
    make = lambda: FireflyModule(  # noqa: E731
        str(tiny_folder),
        optimizer=lambda parameters: AdamW(parameters, 1e-3),
        lr_scheduler=lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10),
    )
    plugins = lambda: {"plugins": [AtomicCheckpointIO(portable)]}  # noqa: E731
    whole = train(tiny_folder, short_rows, tmp_path / "whole", module=make(), max_steps=6, **plugins())
    train(tiny_folder, short_rows, tmp_path, module=make(), max_steps=3, **plugins())
    last = tmp_path / "checkpoints" / "last.ckpt"
    resumed = train(tiny_folder, short_rows, tmp_path, module=make(), ckpt_path=last, max_steps=6, **plugins())
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step >= 3}
    assert resumed.rates == {step: rate for step, rate in whole.rates.items() if step >= 3}
    assert all(map(math.isfinite, resumed.losses.values()))
