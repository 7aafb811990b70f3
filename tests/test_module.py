"""The loss and every gradient are those of stock Bloom, however a step is cut up."""

import math
import shutil

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from transformers import BloomForCausalLM

from firefly_lightning import FireflyDataModule, FireflyError, FireflyModule
from firefly_lightning.model.loss import target_cross_entropy
from firefly_lightning.prompt import PRESETS
from tests.support.helpers import fit, logged, one_line, run
from tests.support.reference import backward, labelled
from tests.support.small_runs import settings

STEP = ["--data.batch_size", 8, "--trainer.max_steps", 1, "--model.warmup_steps", 0, "--model.learning_rate", 1e-3]
RECORD = ["--model", "tests.support.helpers.Recording"]


def stock_step(model_folder, rows_file, numbers: list[int]):
    """Loss and gradients of rows (counted from 0)."""
    model, rows = BloomForCausalLM.from_pretrained(model_folder).float(), labelled(model_folder, rows_file)
    loss = backward(model, [rows[number] for number in numbers])
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(grads, expected, tolerance=1e-5):
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        difference = (grads[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
        assert difference < tolerance, f"{name}: {difference:.1e}"


@pytest.fixture(scope="module")
def expected(model_folder, rows_file, tmp_path_factory):
    data = FireflyDataModule(
        str(model_folder), str(rows_file), batch_size=8, cache_dir=str(tmp_path_factory.mktemp("c"))
    )
    data.prepare_data()
    data.setup("fit")
    rows = data.train.plan.rows(0)
    assert any(data.train.rows[row].input_ids.tolist().count(2) > 3 for row in rows), "rows of several turns among them"
    return stock_step(model_folder, rows_file, rows.tolist())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.micro_batch_size", 8],
        ["--data.micro_batch_size", 2],
        ["--data.micro_batch_size", 8, "--model.gradient_checkpointing", "true"],
        ["--trainer.devices", 2, "--trainer.strategy", "ddp"],
        ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.micro_batch_size", 1],
    ],
    ids=["1 micro-batch", "4 micro-batches", "gradient checkpointing", "2 ranks", "2 ranks of 4 micro-batches"],
)
def test_loss_and_gradients_equal_stock_bloom(model_folder, rows_file, tmp_path, expected, arguments):
    loss, grads = expected
    fit(model_folder, rows_file, tmp_path, *STEP, *RECORD, *arguments)
    assert math.isclose(float(logged(tmp_path)[0]), loss, rel_tol=1e-5)
    assert_close(torch.load(tmp_path / "grads-0-0.pt"), grads)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
    assert math.isclose(float(logged(tmp_path, "grad_norm")[0]), norm, rel_tol=1e-5)


def test_the_last_short_step_of_an_epoch(model_folder, rows_file, tmp_path):
    # 60 rows make seven steps of 8 and one of 4; shared by two ranks with two micro-batches of 2, some hold one row.
    arguments = [
        "--trainer.max_steps",
        8,
        "--data.batch_size",
        8,
        "--model.warmup_steps",
        0,
        "--model.learning_rate",
        0,
    ]
    fit(model_folder, rows_file, tmp_path / "one", *arguments)
    shared = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.micro_batch_size", 2]
    fit(model_folder, rows_file, tmp_path / "two", *arguments, *shared)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert sorted(one) == sorted(two) == list(range(8))
    assert all(math.isclose(float(one[step]), float(two[step]), rel_tol=1e-6) for step in one)


def test_validation_is_weighted_by_target_tokens(model_folder, rows_file, tmp_path):
    common = ["--model.path", model_folder, "--data.val_files", rows_file, "--trainer.accelerator", "cpu"]
    values = {}
    for name, sizes in {"one": [60, 60], "many": [12, 3]}.items():
        root = [
            "--trainer.default_root_dir",
            tmp_path / name,
            "--data.batch_size",
            sizes[0],
            "--data.micro_batch_size",
            sizes[1],
        ]
        run("firefly-fit", "validate", *common, *root)
        values[name] = [float(logged(tmp_path / name, key)[0]) for key in ("val_loss", "val_perplexity")]
    loss, _ = stock_step(model_folder, rows_file, list(range(60)))
    for value, perplexity in values.values():
        assert math.isclose(value, loss, rel_tol=1e-5)
        assert math.isclose(perplexity, math.exp(loss), rel_tol=1e-4)


def test_loss_without_a_target_is_zero_with_zero_gradients():
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.nn.Linear(4, 9)
    loss = target_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == hidden.shape
    assert not head.weight.grad.any()


def test_the_schedule_is_warm_up_into_cosine(model_folder, rows_file, tmp_path):
    steps, warmup, peak = 12, 4, 1e-3
    fit(
        model_folder, rows_file, tmp_path, "--trainer.max_steps", steps, "--model.warmup_steps", warmup,
        "--model.learning_rate", peak, "--data.micro_batch_size", 4,
    )  # fmt: skip
    for step, lr in logged(tmp_path, "lr").items():
        cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert math.isclose(float(lr), peak * (step / warmup if step < warmup else cosine), rel_tol=1e-6)


def test_optimizer_and_schedule_are_replaced_from_yaml(model_folder, rows_file, tmp_path):
    config = tmp_path / "sgd.yaml"
    config.write_text(
        "model:\n  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}\n"
        "  lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 2, gamma: 0.1}}\n"
    )
    fit(
        model_folder, rows_file, tmp_path, "--config", config, "--trainer.max_steps", 4, *RECORD, "--data.batch_size", 8
    )
    assert [round(float(lr), 6) for lr in logged(tmp_path, "lr").values()] == [0.5, 0.5, 0.05, 0.05]
    start = BloomForCausalLM.from_pretrained(model_folder).float()
    saved = load_file(tmp_path / "checkpoints" / "last.ckpt" / "model-0-0.safetensors")
    with torch.no_grad():
        for step, lr in enumerate([0.5, 0.5, 0.05, 0.05]):
            grads = torch.load(tmp_path / f"grads-{step}-0.pt")
            for name, parameter in start.named_parameters():
                parameter -= lr * grads[name]
    for name, parameter in start.named_parameters():
        assert torch.allclose(saved[name], parameter, atol=1e-6), name


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(model_folder, rows_file, tmp_path):
    result = fit(
        model_folder, rows_file, tmp_path, "--model.learning_rate", 1e30, "--model.warmup_steps", 0,
        "--data.batch_size", 4, "--trainer.max_steps", 6, "--checkpoint.every_n_steps", 1, check=False,
    )  # fmt: skip
    message = one_line(result)
    assert message.startswith("step ")
    assert "loss nan" in message or "loss inf" in message or "norm nan" in message or "norm inf" in message
    assert message.count(f"{rows_file}:") == 4


def test_a_downstream_module_adds_its_arguments():
    class Mine(FireflyModule):
        def __init__(self, extra: int, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    module = Mine(3, "folder", warmup_steps=7)
    assert (module.extra, module.path, module.warmup_steps) == (3, "folder", 7)
    assert PRESETS["firefly"].start == "<s>"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_lacks_a_file_is_told_before_rows_are_read(name, tiny_folder, rows_file, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / name).unlink()
    data = FireflyDataModule(str(model), str(rows_file), cache_dir=str(tmp_path / "cache"))
    trainer = L.Trainer(**settings(max_steps=1, default_root_dir=tmp_path))
    with pytest.raises(FireflyError, match=r"model: has no (weights|config\.json)"):
        trainer.fit(FireflyModule(str(model)), data)
    assert not (tmp_path / "cache").exists()
    if name == "model.safetensors":
        trainer.fit(FireflyModule(str(model), from_scratch=True, warmup_steps=0), data)
