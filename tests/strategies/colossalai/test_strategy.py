"""ColossalAI's strategies beyond parity: resuming, placement, processes that share rows and weights, refusals."""

import json
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from firefly_lightning import FireflyError, FireflyModule
from firefly_lightning.strategies import GeminiStrategy, TensorParallelStrategy
from tests.support.choice import DIVIDED
from tests.support.damage import assert_damage_is_found
from tests.support.helpers import fit, logged, one_line, raised_line, run_ranks
from tests.support.reference import Trained
from tests.support.strategies import BATCH_SIZE, CLIP, LEARNING_RATE, WARMUP

GEMINI = ["--trainer.strategy", "firefly_lightning.strategies.GeminiStrategy"]
TENSOR_PARALLEL = ["--trainer.strategy", "firefly_lightning.strategies.TensorParallelStrategy"]

RESUMED = {  # what is kept apart from the 16-bit weights, and how
    "gradients accumulate": ["--trainer.strategy", "gemini", "--data.micro_batch_size", 1],
    "all on the host": ["--trainer.strategy", "gemini_offload"],
    "in tensor parallel": ["--trainer.strategy", "tensor_parallel", "--data.micro_batch_size", 2],
    "spread by ZeRO": [*TENSOR_PARALLEL, "--trainer.strategy.tp_size", 1, "--trainer.strategy.zero_stage", 1],
}


KINDS = {"own": "false", "portable": "true"}
"""Of checkpoints: ColossalAI's own, and those that any strategy reads."""

SAVED = list(zip(RESUMED, [*KINDS] * 2, strict=True)) if DIVIDED else list(product(RESUMED, KINDS))


def test_a_resumed_run_goes_on_exactly_and_its_checkpoint_validates(odd_folder, rows_file, tmp_path):
    commands = []
    for name, own in RESUMED.items():
        common = [
            "--model.path", odd_folder, "--data.train_files", rows_file, "--data.val_fraction", 0.2,
            "--data.batch_size", BATCH_SIZE, "--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR",
            "--model.learning_rate", 1e-3, "--trainer.gradient_clip_val", 0.1, "--trainer.precision", "bf16-mixed",
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.devices", 2, *own,
            "--trainer.default_root_dir",
        ]  # fmt: skip
        commands.append(["firefly-fit", "fit", *common, tmp_path / name / "whole", "--trainer.max_steps", 6])
        for kind in (kind for saved_by, kind in SAVED if saved_by == name):
            parts, kept = tmp_path / name / kind, ["--checkpoint.portable", KINDS[kind]]
            commands += [
                ["firefly-fit", "fit", *common, parts, *kept, "--trainer.max_steps", 4],
                ["firefly-fit", "fit", *common, parts, *kept, "--trainer.max_steps", 6, "--ckpt_path", "last"],
                ["firefly-fit", "validate", *common, parts, "--ckpt_path", "last"],
            ]
    run_ranks(2, *commands)
    for name, kind in SAVED:
        whole, parts = tmp_path / name / "whole", tmp_path / name / kind
        losses = logged(whole)
        assert logged(parts) == losses, name
        validated = list(logged(whole, "val_loss").values())
        assert len(validated) == 1
        assert list(logged(parts, "val_loss").values()) == validated
        assert [float(loss) for loss in logged(parts, "val_loss", version=1).values()] == [
            pytest.approx(float(validated[0]), rel=1e-6)
        ]
    for name in (name for name, kind in SAVED if kind == "own"):
        assert_damage_is_found(tmp_path / name / "own" / "checkpoints" / "last.ckpt", tmp_path / f"{name}.ckpt")


PLACED = {
    "in part": [
        *GEMINI, "--trainer.strategy.shard_param_frac", 0.5, "--trainer.strategy.offload_optim_frac", 0.2,
    ],
    "auto": [
        *GEMINI, "--trainer.strategy.placement_policy", "auto", "--trainer.strategy.simulated_memory_gb", 0.0015,
    ],
    "on the device": ["--trainer.strategy", "gemini"],
    "on the host": ["--trainer.strategy", "gemini_offload"],
}  # fmt: skip


class Placed(FireflyModule):
    """Writes down where the chunks of Gemini are after training."""

    def on_train_end(self):
        groups = self.trainer.strategy.wrapper.chunk_manager.chunk_groups
        chunks = {name: [chunk.device_type for chunk in group] for name, group in groups.items()}
        gathered = sum(chunk.keep_gathered for group in groups.values() for chunk in group)
        with pytest.raises(FireflyError, match="new module"):
            self.trainer.strategy.setup(self.trainer)
        if self.trainer.is_global_zero:
            facts = {"gathered": gathered, **chunks}
            (Path(self.trainer.default_root_dir) / "chunks.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def brief(odd_folder, rows_file, planned_rows) -> Trained:
    """Five steps; parity tests take more."""
    return Trained(odd_folder, rows_file, planned_rows[:5], LEARNING_RATE, WARMUP, CLIP, eps=1e-4)


def assert_trained(root: Path, brief: Trained):
    for name, values in (("train_loss", brief.losses), ("grad_norm", brief.norms)):
        assert [float(value) for value in logged(root, name).values()] == pytest.approx(values, rel=3e-5)


def test_chunks_are_where_they_are_told_to_be_and_train_alike(fit_args, brief, tmp_path):
    own = [
        "--model",
        "tests.strategies.colossalai.test_strategy.Placed",
        "--trainer.devices",
        2,
        "--data.micro_batch_size",
        4,
    ]
    five = ["--trainer.max_steps", 5]
    run_ranks(2, *(fit_args(tmp_path / name, 1e-4, *own, *five, *placed) for name, placed in PLACED.items()))
    for name in PLACED:
        assert_trained(tmp_path / name, brief)
    facts = {name: json.loads((tmp_path / name / "chunks.json").read_text()) for name in PLACED}
    masters = {name: set(fact["fp32_param_2"]) for name, fact in facts.items()}
    assert masters == {"in part": {"cpu", "cuda"}, "auto": {"cpu"}, "on the device": {"cuda"}, "on the host": {"cpu"}}
    assert all(fact["gathered"] == 0 and len(fact["fp16_param_2"]) > 3 for fact in facts.values())


def test_processes_that_share_rows_and_processes_that_share_weights(fit_args, brief, tmp_path):
    own = [*TENSOR_PARALLEL, "--trainer.strategy.zero_stage", 1, "--trainer.max_steps", 5, "--trainer.strategy.tp_size"]
    run_ranks(2, fit_args(tmp_path / "rows", 1e-4, *own, 1, "--trainer.devices", 2, "--data.micro_batch_size", 2))
    run_ranks(4, fit_args(tmp_path / "both", 1e-4, *own, 2, "--trainer.devices", 4, "--data.micro_batch_size", 2))
    assert_trained(tmp_path / "rows", brief)
    assert_trained(tmp_path / "both", brief)


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (GeminiStrategy, {"tp_size": 2}, "wrong gradients there; take tensor_parallel"),
        (GeminiStrategy, {"shard_param_frac": 1.5}, "shard_param_frac is 1.5; it is a share between 0 and 1"),
        (
            GeminiStrategy,
            {"offload_param_frac": 1.0},
            "offload_param_frac needs shard_param_frac and offload_optim_frac",
        ),
        (TensorParallelStrategy, {"tp_size": 0}, "tp_size is 0"),
    ],
)
def test_arguments_that_contradict_each_other(strategy, arguments, message):
    with pytest.raises(FireflyError) as raised:
        strategy(**arguments)
    assert message in raised_line(raised)


@pytest.mark.parametrize("name", ["gemini", "gemini_offload", "tensor_parallel"])
def test_a_missing_engine_is_one_line(name, monkeypatch, odd_folder, rows_file, tmp_path):
    monkeypatch.setattr("firefly_lightning.strategies.colossalai.booster.find_spec", lambda name: None)
    result = fit(odd_folder, rows_file, tmp_path, "--trainer.strategy", name, check=False)
    assert 'pip install "firefly-lightning[colossalai]"' in one_line(result)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.strategy", "gemini", "--trainer.precision", "bf16-true"], "cannot do precision bf16-true"),
        ([*TENSOR_PARALLEL, "--trainer.strategy.tp_size", "3"], "tp_size 3 does not divide 1 processes"),
    ],
)
def test_what_is_refused_before_processes_start(flags, message, odd_folder, rows_file, tmp_path):
    assert message in one_line(fit(odd_folder, rows_file, tmp_path, *flags, check=False))


def test_an_unknown_option_ends_in_one_line_before_weights_are_loaded(odd_folder, rows_file, tmp_path):
    (broken := tmp_path / "model").mkdir()
    for file in odd_folder.glob("*.json"):
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_text("nothing that can be loaded")
    flags = [*GEMINI, "--trainer.strategy.plugin_options", '{"pin_memry": true}']
    result = fit(broken, rows_file, tmp_path, *flags, process=True, check=False)
    assert one_line(result).endswith(
        "plugin_options.pin_memry is no option of ColossalAI's plugin; did you mean pin_memory?"
    )
    assert result.stderr.count("runs on a simulated device") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "max_norm is not to be set"),
        ({"gpu_margin_mem_ratio": 0.5}, "gpu_margin_mem_ratio needs a GPU"),
    ],
)
def test_options_that_are_not_the_users_to_set(options, message, odd_folder):
    strategy = GeminiStrategy(plugin_options=options)
    connected(strategy, odd_folder)
    with pytest.raises(FireflyError) as raised:
        strategy.check_options()
    assert message in raised_line(raised)


@pytest.mark.parametrize("strategy", [GeminiStrategy, TensorParallelStrategy])
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(torch.optim.SGD, lr=0.1), "cannot do SGD; take torch.optim.AdamW or Adam"),
        (partial(torch.optim.AdamW, amsgrad=True), "cannot do AdamW with amsgrad; leave it out"),
    ],
)
def test_optimizers_that_cannot_be_done(strategy, optimizer, message):
    with pytest.raises(FireflyError) as raised:
        strategy().convert_optimizer(optimizer([torch.nn.Parameter(torch.zeros(1))]))
    assert message in raised_line(raised)


def connected(strategy, odd_folder, devices=1, **trainer) -> FireflyModule:
    """A module before it is set up."""
    module = FireflyModule(str(odd_folder))
    module.trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, **trainer)
    strategy.connect(module)
    return module


def test_heads_that_processes_do_not_divide(odd_folder):
    with pytest.raises(FireflyError) as raised:
        connected(TensorParallelStrategy(), odd_folder, devices=4).setup("fit")
    assert "tp_size 4 does not divide the model's 6 heads" in raised_line(raised)


def test_clipping_by_value(odd_folder):
    with pytest.raises(FireflyError) as raised:
        connected(GeminiStrategy(), odd_folder, gradient_clip_val=1.0, gradient_clip_algorithm="value").setup("fit")
    assert "clips by norm only" in raised_line(raised)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision_is_the_trainers_where_the_strategy_is_an_object(precision):
    for strategy in (GeminiStrategy(), TensorParallelStrategy()):
        trainer = L.Trainer(accelerator="cpu", strategy=strategy, precision=precision, logger=False)
        assert trainer.precision == precision


def test_weights_that_colossalai_would_not_train(odd_folder):
    strategy = TensorParallelStrategy()
    module = connected(strategy, odd_folder)
    module.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(FireflyError) as raised:
        strategy._check_optimizer()
    assert "trains the module's `model` alone, not scale" in raised_line(raised)


@pytest.mark.parametrize("steps", [0, 3, 7])
def test_the_scale_of_fp16_is_kept_in_the_form_of_pytorch(steps):
    """ColossalAI's own scaler, which no CPU run has, with two overflows before its scale shrinks."""
    from firefly_lightning.strategies.colossalai.simulated_device import install

    install(None)
    from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler

    from firefly_lightning.strategies.colossalai.fixes import load_scaler_state, scaler_state

    def optimizer():
        scaler = DynamicGradScaler(initial_scale=2**10, growth_interval=5, hysteresis=3)
        return SimpleNamespace(mix_precision_mixin=SimpleNamespace(grad_scaler=scaler))

    first, second = optimizer(), optimizer()
    history = [False, True, False, False, False, False, True][:steps]
    for overflow in history:
        first.mix_precision_mixin.grad_scaler.update(overflow)
    load_scaler_state(second, scaler_state(first))
    torch.amp.GradScaler("cpu").load_state_dict(scaler_state(first))
    for overflow in [True, False, True, True, *[False] * 6]:
        scales = []
        for each in (first, second):
            each.mix_precision_mixin.grad_scaler.update(overflow)
            scales.append(float(each.mix_precision_mixin.grad_scaler.scale))
        assert scales[0] == scales[1]
