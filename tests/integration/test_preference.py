"""Preference tuning under every strategy is that of one process of plain PyTorch; runs stop, are killed, and move."""

import json
from pathlib import Path

import peft
import pytest
import torch

from tests.integration.test_adapter_strategies import ABLE, ADAPTER, LORA
from tests.integration.test_parity import REFUSED, SPELLED_OUT, STRATEGIES, ran, relative, weights_apart
from tests.support.choice import DIVIDED
from tests.support.helpers import fit, logged, run, run_ranks
from tests.support.pair_runs import PREFERENCE, TrainedOnPairs
from tests.support.strategies import BATCH_SIZE, CLIP, LEARNING_RATE, STEPS, WARMUP

TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 3e-2}

CHAIN = ["auto", "zero3", "ddp", "gemini", "fsdp2", "zero1", "tensor_parallel", "zero2", "native_tp"]
"""Strategies in an order in which a run is moved, of all kinds of engines."""

TAKEN = ["ddp", "zero3", "gemini", "tensor_parallel"] if DIVIDED else [name for name in STRATEGIES if name != "auto"]
"""With `--divided` one strategy of each way to hold a model; the chain has others."""


def command(pair_args, strategy: str, root: Path, *more: object) -> list[object]:
    processes, shares = STRATEGIES[strategy]
    own = ["--trainer.strategy", SPELLED_OUT.get(strategy, strategy), "--trainer.devices", processes]
    return pair_args(root, *own, "--data.micro_batch_size", BATCH_SIZE // shares // 2, *more)


def apart(root: Path, expected: TrainedOnPairs, first: int = 0) -> float:
    """How far the losses of a run are from those expected, relatively."""
    losses = {step: float(loss) for step, loss in logged(root).items()}
    assert sorted(losses) == list(range(first, STEPS))
    return max(relative(losses[step], expected.losses[step]) for step in losses)


@pytest.mark.parametrize("strategy", TAKEN)
def test_a_strategy_trains_like_plain_pytorch(strategy, pair_args, expected_of_pairs, val_pairs_file, tmp_path):
    """Validated too, and in both precisions; the reference is measured under the strategy, in a cache of its own."""
    roots = {precision: tmp_path / precision for precision in (["32-true"] if DIVIDED else TOLERANCES)}
    every = ["--trainer.val_check_interval", STEPS // 2, "--trainer.check_val_every_n_epoch", "null"]
    commands = [
        command(pair_args, strategy, root, "--trainer.precision", precision, "--data.cache_dir", root / "cache",
                "--data.val_files", val_pairs_file, *every)
        for precision, root in roots.items()
    ]  # fmt: skip
    if ran(strategy, STRATEGIES[strategy][0], *commands) is None:
        return
    for precision, root in roots.items():
        assert apart(root, expected_of_pairs) < TOLERANCES[precision]
        worst, weights = weights_apart(root, expected_of_pairs)
        assert weights < TOLERANCES[precision], worst
        assert len(logged(root, "val_reward_accuracy")) == len(logged(root, "val_loss")) == 2


def test_a_run_moves_through_all_strategies(pair_args, expected_of_pairs, tmp_path):
    """The reference moves with it: no run has a cache of one before."""
    chain = [strategy for strategy in (CHAIN[::3] if DIVIDED else CHAIN) if strategy not in REFUSED]
    ends = [-(-STEPS * (number + 1) // len(chain)) for number in range(len(chain))]
    losses, checkpoint = {}, []
    for number, (strategy, end) in enumerate(zip(chain, ends, strict=True)):
        root = tmp_path / f"{number}-{strategy}"
        own = ["--data.cache_dir", root / "cache", *checkpoint]
        if end < STEPS:
            own += ["--model", "tests.support.helpers.StoppingOnPairs", "--model.stop_step", end - 1]
        ran(strategy, STRATEGIES[strategy][0], command(pair_args, strategy, root, *own))
        losses |= {step: float(loss) for step, loss in logged(root).items()}
        checkpoint = ["--ckpt_path", root / "checkpoints" / "last.ckpt"]
    assert sorted(losses) == list(range(STEPS))
    assert max(relative(losses[step], expected_of_pairs.losses[step]) for step in losses) < TOLERANCES["32-true"]
    worst, weights = weights_apart(root, expected_of_pairs)
    assert weights < TOLERANCES["32-true"], worst


@pytest.mark.parametrize("strategy", ["zero2"] if DIVIDED else ["auto", "ddp", "zero2", "zero3", "fsdp2"])
def test_an_adapter_trains_like_one_of_peft(strategy, pair_args, odd_folder, pairs_file, planned_pairs, tmp_path):
    assert strategy in ABLE

    def adapt(bloom):
        torch.manual_seed(0)
        return peft.get_peft_model(bloom, peft.LoraConfig(**LORA))

    expected = TrainedOnPairs(odd_folder, pairs_file, planned_pairs, LEARNING_RATE, WARMUP, CLIP, 1e-4, adapt)
    own = [*ADAPTER, "--data.cache_dir", tmp_path / "cache"]
    if ran(strategy, STRATEGIES[strategy][0], command(pair_args, strategy, tmp_path, *own)) is None:
        return
    assert apart(tmp_path, expected) < TOLERANCES["32-true"]


def test_an_engine_that_cannot_evaluate_first_takes_the_reference_of_the_cache(
    pair_args, odd_folder, pairs_file, tmp_path
):
    """Gemini's `auto` learns from the first step what fits."""
    options = {"class_path": "firefly_lightning.strategies.GeminiStrategy", "init_args": {"placement_policy": "auto"}}
    auto = ["--trainer.strategy", json.dumps(options), "--trainer.devices", 1, "--trainer.max_steps", 2]
    cache = ["--data.cache_dir", tmp_path / "cache"]
    with pytest.raises(AssertionError, match="this strategy cannot measure them before the first step"):
        run_ranks(1, pair_args(tmp_path / "refused", *auto, *cache))
    validated = ["--model.path", odd_folder, "--data.val_files", pairs_file, "--trainer.accelerator", "cpu"]
    run("firefly-fit", "validate", *PREFERENCE, *validated, *cache, "--trainer.default_root_dir", tmp_path / "before")
    run_ranks(1, pair_args(tmp_path / "taken", *auto, *cache))
    assert sorted(logged(tmp_path / "taken")) == [0, 1]


ARGS = [
    *PREFERENCE,
    *("--data.batch_size", 8, "--data.micro_batch_size", 4, "--data.val_fraction", 0.2),
    *("--model.learning_rate", 1e-3, "--model.warmup_steps", 2, "--trainer.max_steps", 9),
    *("--trainer.val_check_interval", 4, "--trainer.check_val_every_n_epoch", "null"),
    *("--checkpoint.every_n_steps", 3),
]


def test_a_killed_run_resumes_digit_for_digit(model_folder, pairs_file, tmp_path):
    """And without the cache of before, with which its first weights would not be needed."""
    fit(model_folder, pairs_file, tmp_path / "whole", *ARGS)
    kill = ["--model", "tests.support.helpers.KilledOnPairs", "--model.kill_step", 7]
    first = ["--data.cache_dir", tmp_path / "a"]
    killed = fit(model_folder, pairs_file, tmp_path / "run", *ARGS, *first, *kill, check=False, process=True)
    assert killed.returncode == -9
    assert max(logged(tmp_path / "run")) == 6
    fit(model_folder, pairs_file, tmp_path / "run", *ARGS, "--data.cache_dir", tmp_path / "b", "--ckpt_path", "last")
    for name in ("train_loss", "train_reward_margin", "val_loss", "val_reward_margin"):
        whole = logged(tmp_path / "whole", name)
        assert logged(tmp_path / "run", name) == whole, name


def test_the_configuration_trains(model_folder, pairs_file, val_pairs_file, tmp_path):
    own = ["--config", "configs/dpo.yaml", "--data.val_files", val_pairs_file, "--data.batch_size", 8]
    short = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.precision", "32-true",
             "--trainer.default_root_dir", tmp_path]  # fmt: skip
    fit(model_folder, pairs_file, tmp_path, *own, *short)
    assert sorted(logged(tmp_path, "train_reward_accuracy")) == [0, 1]
    saved = json.dumps(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
    assert "last.ckpt" in saved
