"""ZeRO by DeepSpeed: a resumed run goes on under the schedules that DeepSpeed makes."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime import lr_schedules

from tests.strategies.deepspeed.test_strategy import by_config, command
from tests.support.helpers import logged, run_ranks
from tests.support.schedules import OPTIMIZERS, STEPS, assert_resumes

SCHEDULES = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 2},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 3, "decay_step_size": 2,
                 "decay_lr_rate": 0.1, "decay_mom_rate": 0.1},
    "WarmupLR": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": STEPS, "warmup_max_lr": 1e-3, "warmup_num_steps": 4},
    "WarmupCosineLR": {"total_num_steps": STEPS, "warmup_num_steps": 4},
}  # fmt: skip
"""By its name, the parameters of each of DeepSpeed's schedules."""

RUNS = {"zero1": ("WarmupLR", "true"), "zero2": ("WarmupDecayLR", "false"), "zero3": ("OneCycle", "true")}
"""By stage, the schedule of a run, and whether its checkpoints are portable."""


def test_every_schedule_of_deepspeed_is_tried():
    assert set(SCHEDULES) == set(lr_schedules.VALID_LR_SCHEDULES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_deepspeed(name, optimizer):
    if name == "OneCycle" and optimizer == "momentum":
        pytest.skip("DeepSpeed cycles the betas of Adam only")
    assert_resumes(OPTIMIZERS[optimizer], lambda made: getattr(lr_schedules, name)(made, **SCHEDULES[name]))


@pytest.fixture(scope="module")
def resumed(tiny_folder, short_rows, tmp_path_factory) -> Path:
    """By stage: a run of six steps in `whole`, and one from its third step on in `parts`."""
    folder, commands = tmp_path_factory.mktemp("schedules"), []
    for stage, (name, portable) in RUNS.items():
        config = folder / f"{stage}.json"
        config.write_text(
            json.dumps(
                {
                    "zero_optimization": {"stage": int(stage[-1])},
                    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                    "scheduler": {"type": name, "params": SCHEDULES[name]},
                }
            )
        )
        third = folder / stage / "whole" / "checkpoints" / "step=3.ckpt"
        for part, resume in (("whole", []), ("parts", ["--ckpt_path", third])):
            root = folder / stage / part
            args = ["--trainer.max_steps", 6, "--data.batch_size", 8, "--data.micro_batch_size", 4,
                    "--checkpoint.every_n_steps", 3, "--checkpoint.keep", 3, "--checkpoint.portable", portable,
                    "--trainer.devices", 1, *resume]  # fmt: skip
            commands.append(command("fit", by_config(config), tiny_folder, short_rows, root, *args))
    run_ranks(1, *commands)
    return folder


@pytest.mark.parametrize("stage", RUNS)
@pytest.mark.parametrize("name", ["lr", "train_loss", "grad_norm"])
def test_a_resumed_run_goes_on_digit_for_digit(resumed, stage, name):
    whole, parts = (logged(resumed / stage / part, name) for part in ("whole", "parts"))
    assert sorted(parts) == [3, 4, 5]
    assert parts == {step: value for step, value in whole.items() if step >= 3}
    if name == "lr":
        assert len(set(parts.values())) > 1 or stage == "zero1"
        assert all(float(rate) > 0 for rate in parts.values())


def test_a_schedule_without_an_optimizer_is_refused(tiny_folder, short_rows, tmp_path):
    """The module's would hold, and DeepSpeed would say nothing."""
    config = tmp_path / "ds.json"
    schedule = {"type": "WarmupLR", "params": SCHEDULES["WarmupLR"]}
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "scheduler": schedule}))
    args = ["--trainer.max_steps", 2, "--trainer.devices", 1]
    text = run_ranks(1, (lambda name, *rest: [f"-{name}", *rest])(
        *command("fit", by_config(config), tiny_folder, short_rows, tmp_path, *args)))  # fmt: skip
    assert "the DeepSpeed configuration has a scheduler but no optimizer, and the module has both" in text
    assert "Traceback" not in text
