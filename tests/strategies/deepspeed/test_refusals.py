"""ZeRO by DeepSpeed: which optimizers and configurations it takes, and what it refuses, in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning import errors
from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies import ZeroStrategy
from firefly_lightning.strategies.deepspeed.config import (
    check_zero,
    read_config,
    settle,
    settle_precision,
    without_auto,
)
from firefly_lightning.strategies.deepspeed.machine import cpu_adam
from firefly_lightning.strategies.hooks import check_accumulation
from tests.strategies.deepspeed.test_strategy import FP16, HERE, by_config, command
from tests.support.helpers import one_line, raised_line, run, run_forked, run_ranks


@pytest.fixture(scope="module")
def refusals(odd_folder, large_folder, rows_file, tmp_path_factory) -> str:
    """What is said by runs that must fail; their weights cannot be loaded where refusing must come before that."""
    root, empty, lacking = (tmp_path_factory.mktemp(name) for name in ("root", "empty", "lacking"))
    contradicting = root / "contradicting.json"
    contradicting.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 3}))
    for folder in (empty, lacking):
        shutil.copytree(odd_folder, folder, dirs_exist_ok=True)
    (empty / "model.safetensors").write_text("nothing that can be loaded")
    leave_out(lacking / "model.safetensors", "transformer.h.1.mlp.dense_h_to_4h.weight")
    commands = []

    def add(strategy: str, folder: Path, *more: object, model: str = "") -> None:
        name, *rest = command("fit", strategy, folder, rows_file, root, *more, "--trainer.max_steps", 3, model=model)
        commands.append([f"-{name}", *rest])

    for strategy, precision in (("zero1", "bf16-mixed"), ("zero2", "32-true"), ("zero3", "bf16-mixed")):
        add(strategy, odd_folder, "--trainer.precision", precision, model=f"{HERE}.Spoiling")
    add("zero3", lacking)
    add("zero2_offload", odd_folder, model=f"{HERE}.OwnModel")
    add("zero2_offload", empty, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 1e-3)
    add("zero2", empty, "--trainer.gradient_clip_val", 0.1, "--trainer.gradient_clip_algorithm", "value")
    add("zero2", empty, "--trainer.precision", "16-mixed")
    add(by_config(contradicting), empty)
    add("zero3", large_folder, model=f"{HERE}.Measured")
    text = run_ranks(2, *commands)
    assert "Traceback" not in text, text
    return text


@pytest.fixture(scope="module")
def large_folder(odd_folder, tmp_path_factory) -> Path:
    """A model of about 100 MB, in one file."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(odd_folder, folder, dirs_exist_ok=True)
    BloomForCausalLM(BloomConfig(vocab_size=1499, hidden_size=512, n_layer=8, n_head=8)).save_pretrained(folder)
    return folder


def leave_out(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def test_a_gradient_that_is_not_finite_ends_the_run(refusals):
    lines = [line for line in refusals.splitlines() if "error: step 1: loss 7." in line and "gradient norm inf" in line]
    assert len(lines) == 2 * 3, refusals


def test_weights_under_stage_3_never_lie_whole_in_memory(refusals, large_folder):
    size = (large_folder / "model.safetensors").stat().st_size
    taken = [int(found) for found in re.findall(r"took (\d+) bytes", refusals)]
    assert len(taken) == 2
    assert all(0.45 * size < found < 0.75 * size for found in taken), (taken, size)


@pytest.mark.parametrize(
    "message",
    [
        "the weights lack transformer.h.1.mlp.dense_h_to_4h.weight; fetch them again",
        "offload_optimizer needs DeepSpeedCPUAdam, not AdamW; in configure_optimizers, take",
        "offload_optimizer: DeepSpeed has no SGD on the host; take torch.optim.AdamW or Adam",
        "trainer.gradient_clip_algorithm: DeepSpeed clips by norm only; leave it out",
        "the DeepSpeed configuration has gradient_accumulation_steps 3, the plan of steps 1; leave it out there",
    ],
)
def test_is_refused_in_one_line(refusals, message):
    assert refusals.count(message) == 2  # each of the two processes


def test_fp16_is_refused_where_the_processor_has_none(refusals):
    assert ("16-mixed: DeepSpeed has no fp16 on this processor; take bf16-mixed" in refusals) == (not FP16)


@pytest.mark.parametrize("package", ["deepspeed", "accelerate"])
def test_a_missing_engine_names_the_extra(monkeypatch, model_folder, rows_file, tmp_path, package):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else name)
    result = run(*command("fit", "zero2", model_folder, rows_file, tmp_path), check=False)
    assert one_line(result) == f'{package} is not installed; run pip install "firefly-lightning[deepspeed]"'


def test_a_missing_compiler_is_named(monkeypatch, model_folder, rows_file, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    args = command("fit", "zero2_offload", model_folder, rows_file, tmp_path, "--trainer.devices", 1)
    line = one_line(run(*args, check=False, how=run_forked))
    assert "DeepSpeed cannot compile its Adam (there is no C++ compiler no-such-compiler); install g++" in line


def test_lightnings_own_strategies_are_refused_where_they_would_divide_twice():
    with pytest.raises(FireflyError) as raised:
        check_accumulation(DeepSpeedStrategy(stage=3), 4)
    assert "divides gradients by 4 micro-batches twice; take trainer.strategy zero3" in raised_line(raised)
    check_accumulation(DeepSpeedStrategy(stage=3), 1)
    check_accumulation(ZeroStrategy(stage=3), 4)


# ---------------------------------------------------------------------------------- optimizers and configurations


def test_adam_keeps_its_groups_on_the_host():
    weights = [Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": weights[:1], "lr": 0.5, "weight_decay": 0.1}, {"params": weights[1:]}]
    for kind, decoupled in ((AdamW, True), (Adam, False)):
        converted = cpu_adam(kind(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.0))
        assert type(converted).__name__ == "DeepSpeedCPUAdam"
        assert converted.adam_w_mode is decoupled
        kept = [(group["lr"], group["betas"], group["eps"], group["weight_decay"]) for group in converted.param_groups]
        assert kept == [(0.5, (0.8, 0.9), 1e-3, 0.1), (1e-2, (0.8, 0.9), 1e-3, 0.0)]
        assert [group["params"] for group in converted.param_groups] == [weights[:1], weights[1:]]


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(SGD, "SGD"), (lambda p: AdamW(p, amsgrad=True), "AdamW with amsgrad"), (torch.optim.NAdam, "NAdam")],
)
def test_other_optimizers_are_refused_on_the_host(optimizer, name):
    with pytest.raises(FireflyError) as raised:
        cpu_adam(optimizer([Parameter(torch.ones(3))]))
    assert f"DeepSpeed has no {name} on the host" in raised_line(raised)


def test_options_reach_deepspeed(tmp_path):
    nvme = {"offload_optimizer_device": "nvme", "offload_params_device": "nvme", "nvme_path": str(tmp_path)}
    strategy = ZeroStrategy(stage=3, offload_optimizer=True, offload_parameters=True, **nvme, thread_count=4)
    zero = strategy.config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        assert (zero[section]["device"], zero[section]["nvme_path"]) == ("nvme", str(tmp_path))
    assert strategy.config["aio"]["thread_count"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 0}, "ZeRO has the stages 1, 2 and 3, not 0; take ddp"),
        ({"zero_optimization": False}, "not 0"),
        ({"stage": 2, "offload_parameters": True}, "offload_param to cpu needs stage 3, this is stage 2"),
        ({"stage": 3, "offload_parameters": True, "offload_params_device": "gpu"}, "there is no device gpu"),
        (
            {"stage": 3, "offload_optimizer": True, "offload_optimizer_device": "nvme", "nvme_path": "/no/such"},
            "offload_optimizer: nvme_path /no/such is no folder to write to",
        ),
        ({"load_full_weights": True}, "export the checkpoint"),
        ({"config": "/no/such.json"}, "/no/such.json: No such file or directory"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(FireflyError) as raised:
        ZeroStrategy(**options)
    assert message in raised_line(raised)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(FireflyError) as raised:
        read_config(tmp_path / "zero.json")
    assert "zero.json: " in raised_line(raised)


def test_what_is_left_to_the_trainer_is_left_out():
    config = {
        "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "x": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupLR"},
    }  # fmt: skip
    expected = {"bf16": {}, "zero_optimization": {"stage": 3}, "scheduler": {"type": "WarmupLR"}}
    assert without_auto(config) == expected


def test_a_configuration_must_agree_with_plan_and_trainer():
    config = {"gradient_clipping": 1.0, "bf16": {}, "fp16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    settle(config, "train_batch_size", 8, "the plan")
    settle_precision(config, "bf16-mixed")
    check_zero(config)
    assert config["train_batch_size"] == 8
    assert config["bf16"] == {"enabled": True}
    with pytest.raises(FireflyError, match=r"has gradient_clipping 1.0, the trainer 0.5; leave it"):
        settle(config, "gradient_clipping", 0.5, "the trainer")
    with pytest.raises(FireflyError, match=r"has bf16 enabled True, but trainer.precision is 32-true"):
        settle_precision(config, "32-true")
