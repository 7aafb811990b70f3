"""Optimizers go on under several processes, those that update each number by itself also with weights in parts."""

import json
import math

import pytest

from tests.integration.test_parity import REFUSED
from tests.support.choice import DIVIDED
from tests.support.helpers import fit, logged, run_ranks
from tests.support.optimizers import ALL, ELEMENTWISE, WHOLE

STEPS, STOP = 5, 2

TRIED = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "native_tp")
"""All but the first update parts of weights; ColossalAI's and offloading take Adam and AdamW, which others test."""

OF_DIVIDED = {"zero2": ("SGD with momentum",), "fsdp2": ("NAdam",)}
"""What `.ci/run` tries: NAdam counts two numbers, and no others do."""


def settings(name: str) -> list[str]:
    path, arguments = ALL[name]
    # Where a gradient is all rounding, as that of a key's bias, an eps too small makes whole steps of it.
    eps = {"eps": 1e-4} if path.endswith(("Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta")) else {}
    own = {**eps, "lr": 1e-3 if path.endswith(("Lion", "Adagrad", "RMSprop")) else 1e-2, **arguments}
    return ["--model.optimizer", json.dumps({"class_path": path, "init_args": own})]


def command(odd_folder, rows_file, strategy: str, name: str, root, steps: int, *more: object) -> list[object]:
    return [
        "firefly-fit", "fit", "--model.path", odd_folder, "--data.train_files", rows_file, "--data.batch_size", 4,
        "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.strategy", strategy, "--trainer.devices", 2, "--trainer.max_steps", steps,
        "--model.warmup_steps", 1, *settings(name), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", OF_DIVIDED if DIVIDED else [name for name in TRIED if name not in REFUSED])
def test_a_run_in_parts_goes_on_and_moves(strategy, odd_folder, rows_file, tmp_path):
    names = OF_DIVIDED[strategy] if DIVIDED else names_of(strategy)
    forms = (True,) if DIVIDED else (True, False)
    commands = []
    for name in names:
        for portable in forms:
            make = lambda folder, steps, *more: command(  # noqa: E731
                odd_folder, rows_file, strategy, name, tmp_path / f"{name}-{portable}" / folder, steps,  # noqa: B023
                "--checkpoint.portable", portable, *more,  # noqa: B023
            )  # fmt: skip
            last = tmp_path / f"{name}-{portable}" / "part" / "checkpoints" / "last.ckpt"
            more = [make("whole", STEPS)] if portable else []
            commands += [*more, make("part", STOP), make("resumed", STEPS, "--ckpt_path", last)]
    run_ranks(2, *commands)
    for name in names:
        whole = losses(tmp_path / f"{name}-True" / "whole")
        assert sorted(whole) == list(range(STEPS))
        for portable in forms:
            assert_near(losses(tmp_path / f"{name}-{portable}" / "resumed"), whole, 1e-5, name)
        moved = tmp_path / f"{name}-True" / "moved"
        last = tmp_path / f"{name}-True" / "part" / "checkpoints" / "last.ckpt"
        own = ["--data.batch_size", 4, "--trainer.max_steps", STEPS, "--model.warmup_steps", 1, *settings(name)]
        fit(odd_folder, rows_file, moved, *own, "--ckpt_path", last)
        assert_near(losses(moved), whole, 1e-5, name)


def names_of(strategy: str) -> list[str]:
    """`native_tp` refuses what steps over all weights together, DeepSpeed Adagrad; torchao's compile."""
    if strategy == "ddp":
        return [name for name in WHOLE if "." in WHOLE[name][0]]
    left_out = ("AdamW, foreach", "AdamW, fused") if strategy == "native_tp" else ()
    return [name for name in ELEMENTWISE if name not in left_out and not (name == "Adagrad" and "zero" in strategy)]


def losses(root) -> dict[int, float]:
    return {step: float(loss) for step, loss in logged(root).items()}


def assert_near(found: dict[int, float], whole: dict[int, float], tolerance: float, name: str) -> None:
    assert sorted(found) == list(range(STOP, STEPS)), name
    for step, loss in found.items():
        assert math.isclose(loss, whole[step], rel_tol=tolerance), (name, step, loss, whole[step])
