"""Every strategy trains like one process of plain PyTorch: same first loss, same losses of all steps, same weights.

Here those of PyTorch; `test_engine_parity.py` has those of DeepSpeed and ColossalAI.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import BloomForCausalLM

from tests.support.choice import DIVIDED
from tests.support.helpers import ROOT, logged, run, run_ranks
from tests.support.strategies import BATCH_SIZE, STEPS

ENGINES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "gemini", "gemini_offload", "tensor_parallel")
"""Strategies of DeepSpeed and ColossalAI."""

# name: (processes, of them data-parallel)
STRATEGIES = {
    "auto": (1, 1),
    "ddp": (2, 2),
    **dict.fromkeys(ENGINES, (2, 2)),
    "tensor_parallel": (2, 1),
    "fsdp2": (2, 2),
    "native_tp": (2, 1),
}

# By default DeepSpeed keeps what is as small as the tests' model whole on every process, and shards nothing.
NOTHING_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def sharded(**zero: object) -> str:
    """Stage 3 as a YAML file spells it out."""
    config = {"zero_optimization": {"stage": 3, **NOTHING_WHOLE, **zero}}
    return json.dumps({"class_path": "firefly_lightning.strategies.ZeroStrategy", "init_args": {"config": config}})


OFFLOADED = {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}
SPELLED_OUT = {"zero3": sharded(), "zero3_offload": sharded(**OFFLOADED)}

CONFIGS = ROOT / "configs" / "strategy"

EVERY = STEPS // 2 - 1
"""Steps between validations: two of them, none at the end."""

# What torch itself cannot do without a GPU, and what is said then.
REFUSED = {"fsdp2": "runs FSDP2 on GPUs only"} if torch.__version__ < "2.6" else {}

RUNS = [  # Adam's eps, micro-batches of a step, precision, tolerance
    (1e-8, 4, "32-true", 1e-4),
    (1e-4, 4, "bf16-mixed", 2e-2),
    (1e-4, 1, "32-true", 1e-4),
]
if DIVIDED:  # two micro-batches are accumulated as four are; test_moving has the like of the last
    RUNS = [(1e-8, 2, "32-true", 1e-4), (1e-4, 2, "bf16-mixed", 2e-2)]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ENGINES])
def test_a_strategy_trains_like_plain_pytorch(strategy, fit_args, expected, rows_file, tmp_path):
    trains_like_plain_pytorch(strategy, fit_args, expected, rows_file, tmp_path)


def trains_like_plain_pytorch(strategy, fit_args, expected, rows_file, tmp_path):
    processes, shares = STRATEGIES[strategy]
    commands, roots = [], []
    for eps, accumulated, precision, _ in RUNS:
        roots.append(tmp_path / f"{eps}-{accumulated}-{precision}")
        file = CONFIGS / f"{strategy}.yaml"
        named = ["--trainer.strategy", SPELLED_OUT.get(strategy, strategy)]
        chosen = ["--config", file] if not commands and file.is_file() else named
        own = [*chosen, "--trainer.devices", processes, "--trainer.precision", precision]
        micro_batch_size = BATCH_SIZE // shares // accumulated
        commands.append(fit_args(roots[-1], eps, *own, "--data.micro_batch_size", micro_batch_size))
    every = [
        "--trainer.val_check_interval",
        EVERY,
        "--trainer.check_val_every_n_epoch",
        "null",
        "--trainer.limit_val_batches",
        1,
    ]
    answers = ["--samples.prompts", '["在吗？", "你好"]', "--model.decoding.max_new_tokens", 4]
    commands[0] += ["--data.val_files", rows_file, *every, *answers]
    printed = ran(strategy, processes, *commands)
    if printed is None:
        return
    assert re.findall(r"Answers at step (\d+):", printed) == [f"{EVERY}", f"{2 * EVERY}"], "by one process"
    problems = []
    for root, (eps, _, precision, tolerance) in zip(roots, RUNS, strict=True):
        problems += [f"{root.name}: {problem}" for problem in differences(root, expected[eps], tolerance, precision)]
    assert not problems, "\n".join(problems)


def test_every_strategy_has_a_configuration_that_opens_with_its_command():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {file.stem for file in files} == STRATEGIES.keys() - {"auto", "ddp"}
    for file in files:
        command = file.read_text("utf-8").splitlines()[0]
        assert command == f"# firefly-fit fit --config configs/firefly-1b4.yaml --config configs/strategy/{file.name}"
        run("firefly-fit", *command.split()[2:], "--print_config")


def ran(strategy: str, processes: int, *commands: list[object]) -> str | None:
    """Runs commands, and returns what they print; where the strategy must refuse this torch, sees that it does."""
    if strategy not in REFUSED:
        return run_ranks(processes, *commands)
    with pytest.raises(AssertionError, match=REFUSED[strategy]):
        run_ranks(processes, commands[0])
    return None


def differences(root: Path, expected, tolerance: float, precision: str) -> list[str]:
    losses = [float(loss) for _, loss in sorted(logged(root).items())]
    norms = [float(norm) for _, norm in sorted(logged(root, "grad_norm").items())]
    assert len(losses) == len(norms) == len(expected.losses) == STEPS
    found = {
        "first loss": (relative(losses[0], expected.losses[0]), 1e-5 if precision == "32-true" else tolerance),
        "losses": (max(map(relative, losses, expected.losses)), tolerance),
        "gradient norms": (max(map(relative, norms, expected.norms)), 10 * tolerance),
    }
    worst, apart = weights_apart(root, expected)
    found[f"weights, {worst}"] = (apart, tolerance)
    print(root.name, {name: f"{value:.1e}" for name, (value, _) in found.items()})
    return [f"{name} differ by {value:.1e}" for name, (value, most) in found.items() if not value <= most]


def weights_apart(root: Path, expected) -> tuple[str, float]:
    """The exported weight that differs most from what was expected, and by how much."""
    run("firefly", "export", "--checkpoint", root / "checkpoints" / "last.ckpt", "--out", root / "exported")
    trained = dict(BloomForCausalLM.from_pretrained(root / "exported").named_parameters())
    assert trained.keys() == dict(expected.model.named_parameters()).keys()
    apart = {name: difference(trained[name], value) for name, value in expected.model.named_parameters()}
    worst = max(apart, key=apart.get)
    return worst, apart[worst]


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected) if math.isfinite(value) else math.inf


def difference(weight: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest weight of the tensor."""
    return float((weight.float() - expected).abs().max() / expected.abs().max())
