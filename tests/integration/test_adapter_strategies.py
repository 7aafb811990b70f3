"""An adapter trains under every strategy like one of stock peft in plain PyTorch, and a run moves between them."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from firefly_lightning.strategies.catalogue import CATALOGUE
from tests.integration.test_parity import REFUSED, SPELLED_OUT, STRATEGIES, difference, ran, relative
from tests.support.choice import DIVIDED
from tests.support.helpers import logged, one_line, run
from tests.support.reference import Trained
from tests.support.strategies import BATCH_SIZE, CLIP, LEARNING_RATE, STEPS, WARMUP

EPS, TOLERANCE = 1e-4, 1e-4

LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
ADAPTER = ["--model.adapter", json.dumps({"class_path": "peft.LoraConfig", "init_args": LORA})]

ABLE = [entry.name for entry in CATALOGUE if entry.trains_adapters]
CHAIN = ["auto", "ddp", "zero3", "zero1", "fsdp2", "zero2_offload", "zero2", "zero3_offload"]
"""All of them, in an order in which a run is moved."""


@pytest.fixture(scope="module")
def expected_adapter(odd_folder, rows_file, planned_rows) -> Trained:
    def adapt(bloom):
        torch.manual_seed(0)
        return peft.get_peft_model(bloom, peft.LoraConfig(**LORA))

    return Trained(odd_folder, rows_file, planned_rows, LEARNING_RATE, WARMUP, CLIP, EPS, adapt)


def command(fit_args, strategy: str, root: Path, *more: object) -> list[object]:
    processes, shares = STRATEGIES[strategy]
    own = ["--trainer.strategy", SPELLED_OUT.get(strategy, strategy), "--trainer.devices", processes]
    return fit_args(root, EPS, *own, "--data.micro_batch_size", BATCH_SIZE // shares // 2, *ADAPTER, *more)


def weights_apart(root: Path, expected: Trained, out: Path) -> float:
    """How far the exported adapter is from the expected one, relative to the largest weight of each tensor."""
    run("firefly", "export", "--checkpoint", root / "checkpoints" / "last.ckpt", "--out", out, "--adapter")
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    exported = dict(peft.PeftModel.from_pretrained(base, out).named_parameters())
    trained = {name: weight for name, weight in expected.model.named_parameters() if weight.requires_grad}
    assert trained
    return max(difference(exported[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize("strategy", ["zero2"] if DIVIDED else ABLE)
def test_a_strategy_trains_an_adapter_like_peft(strategy, fit_args, expected_adapter, tmp_path):
    if ran(strategy, STRATEGIES[strategy][0], command(fit_args, strategy, tmp_path)) is None:
        return
    losses = {step: float(loss) for step, loss in logged(tmp_path).items()}
    norms = {step: float(norm) for step, norm in logged(tmp_path, "grad_norm").items()}
    assert sorted(losses) == list(range(STEPS))
    assert relative(losses[0], expected_adapter.losses[0]) < 1e-5
    assert max(relative(losses[step], expected_adapter.losses[step]) for step in losses) < TOLERANCE
    assert max(relative(norms[step], expected_adapter.norms[step]) for step in norms) < 10 * TOLERANCE
    assert weights_apart(tmp_path, expected_adapter, tmp_path / "exported") < TOLERANCE


def test_a_run_of_an_adapter_moves_through_all_strategies(fit_args, expected_adapter, tmp_path):
    chain = [strategy for strategy in (CHAIN[::2] if DIVIDED else CHAIN) if strategy not in REFUSED]
    ends = [-(-STEPS * (number + 1) // len(chain)) for number in range(len(chain))]
    losses, checkpoint = {}, []
    for number, (strategy, end) in enumerate(zip(chain, ends, strict=True)):
        stopping = ["--model", "tests.support.helpers.Stopping", "--model.stop_step", end - 1] if end < STEPS else []
        root = tmp_path / f"{number}-{strategy}"
        ran(strategy, STRATEGIES[strategy][0], command(fit_args, strategy, root, *stopping, *checkpoint))
        losses |= {step: float(loss) for step, loss in logged(root).items()}
        checkpoint = ["--ckpt_path", root / "checkpoints" / "last.ckpt"]
    assert sorted(losses) == list(range(STEPS))
    assert max(relative(losses[step], expected_adapter.losses[step]) for step in losses) < TOLERANCE
    assert weights_apart(root, expected_adapter, tmp_path / "exported") < TOLERANCE


@pytest.mark.parametrize("strategy", ["zero3"] if DIVIDED else ["auto", "zero2", "zero3", "fsdp2"])
def test_a_checkpoint_in_an_engines_own_form_holds_the_adapter(strategy, fit_args, expected_adapter, tmp_path):
    own, middle = ["--checkpoint.portable", "false"], STEPS // 2
    stopping = ["--model", "tests.support.helpers.Stopping", "--model.stop_step", middle - 1]
    first, second = tmp_path / "first", tmp_path / "second"
    resuming = ["--ckpt_path", first / "checkpoints" / "last.ckpt"]
    commands = [(first, *own, *stopping), (second, *own, *resuming)]
    if ran(strategy, STRATEGIES[strategy][0], *(command(fit_args, strategy, *each) for each in commands)) is None:
        return
    losses = {step: float(loss) for step, loss in logged(second).items()}
    assert min(losses) in (middle - 1, middle), "the step in which it was stopped is done again, or is not"
    assert sorted(losses) == list(range(min(losses), STEPS))
    assert max(relative(losses[step], expected_adapter.losses[step]) for step in losses) < TOLERANCE
    assert weights_apart(second, expected_adapter, tmp_path / "exported") < TOLERANCE


@pytest.mark.parametrize("quantize", ["nf4"] if DIVIDED else ["nf4", "int8"])
def test_quantised_weights_give_the_same_losses_under_every_strategy_that_holds_them_whole(
    quantize, fit_args, tmp_path
):
    strategies = (
        ["auto", "zero2"]
        if DIVIDED
        else [entry.name for entry in CATALOGUE if entry.trains_adapters and entry.whole_weights]
    )
    assert {"ddp", "zero1", "zero2_offload"} < set(strategies) or DIVIDED
    losses = {}
    if transformers.__version__.startswith("4."):
        args = [*fit_args(tmp_path, EPS, "--trainer.devices", 1), *ADAPTER, "--model.quantize", quantize]
        told = f"model.quantize {quantize}: transformers {transformers.__version__} cannot do it on this device; "
        assert one_line(run(*args, check=False)).startswith(told)
        return
    for strategy in strategies:
        args = command(fit_args, strategy, tmp_path / strategy, "--model.quantize", quantize)
        ran(strategy, STRATEGIES[strategy][0], args)
        losses[strategy] = [float(loss) for _, loss in sorted(logged(tmp_path / strategy).items())]
    assert losses["auto"][-1] < losses["auto"][0]
    for found in losses.values():
        assert max(map(relative, found, losses["auto"])) < TOLERANCE


def test_all_strategies_that_can_are_in_the_chain():
    assert sorted(CHAIN) == sorted(ABLE)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - set(ABLE)))
def test_other_strategies_say_no_before_weights_are_loaded(strategy, fit_args, tmp_path, odd_folder):
    args = ["--trainer.strategy", strategy, "--trainer.devices", 1, *ADAPTER]
    line = one_line(run(*fit_args(tmp_path, EPS, *args), check=False))
    assert line == f"model.adapter: this strategy trains all weights only; take one of {', '.join(ABLE)}"


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_quantised_weights_are_not_sharded(strategy, fit_args, tmp_path):
    args = ["--trainer.strategy", strategy, "--trainer.devices", 1, *ADAPTER, "--model.quantize", "nf4"]
    line = one_line(run(*fit_args(tmp_path, EPS, *args), check=False))
    message = "model.quantize: this strategy shards weights, which must be whole; take one of auto, ddp, zero1, zero2"
    assert line.startswith(message) or strategy in REFUSED
