"""ZeRO by DeepSpeed: random weights, precisions, configurations and optimizers."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from firefly_lightning import FireflyModule
from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies import ZeroStrategy
from tests.support.choice import DIVIDED
from tests.support.helpers import logged, memory_taken, run_ranks

HERE = "tests.strategies.deepspeed.test_strategy"
FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()


class Drawn(FireflyModule):
    """Saves the weights that it begins with."""

    def on_train_start(self):
        super().on_train_start()
        save_weights(self)


class OwnModel(FireflyModule):
    """A user's own: a Hugging Face model that draws some weights of a module with its parent's, and a plain layer."""

    def configure_model(self):
        if self.model is None:
            self.model = GPT2LMHeadModel(GPT2Config(vocab_size=1500, n_embd=24, n_layer=3, n_head=2, n_positions=512))
            self.plain = torch.nn.Linear(24, 24)

    def on_train_start(self):
        save_weights(self)

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        return self.model(ids, labels=ids).loss + self.plain.weight.square().sum() + self.plain.bias.sum()

    def configure_optimizers(self):
        return AdamW(self.parameters(), 1e-3)

    def on_before_optimizer_step(self, optimizer):
        """Nothing of FireflyModule's."""

    def on_train_batch_end(self, *args):
        """Likewise."""

    def on_save_checkpoint(self, checkpoint):
        """Likewise."""


class Spoiling(FireflyModule):
    """A finite loss whose gradient is not."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (loss - loss).sqrt() if batch["step"] == 1 else loss


class Measured(FireflyModule):
    """Tells how much memory loading took at its peak, and ends."""

    def configure_model(self):
        with memory_taken(0.002) as taken:
            super().configure_model()
        raise FireflyError(f"rank {self.global_rank} took {taken[0]} bytes")


class Inspected(FireflyModule):
    """Writes down what DeepSpeed was told."""

    def on_train_start(self):
        super().on_train_start()
        engine = self.trainer.strategy.deepspeed_engine
        inner = engine.optimizer.optimizer
        group = {name: inner.param_groups[0][name] for name in ("betas", "eps", "weight_decay")}
        facts = {
            "stage": engine.zero_optimization_stage(),
            "bucket": engine.zero_reduce_bucket_size(),
            "rows": engine.train_micro_batch_size_per_gpu(),
            "accumulated": engine.gradient_accumulation_steps(),
            "clip": engine.gradient_clipping(),
            "optimizer": type(inner).__name__,
            "decoupled": getattr(inner, "adam_w_mode", None),
            **group,
        }
        (Path(self.trainer.default_root_dir) / "facts.json").write_text(json.dumps(facts))


class Ungathered(ZeroStrategy):
    """Without what initialises random models rightly."""

    model_sharded_context = DeepSpeedStrategy.model_sharded_context


class DividingTwice(ZeroStrategy):
    """Without what keeps DeepSpeed from dividing gradients that Lightning has divided."""

    backward = DeepSpeedStrategy.backward


class Scaled(FireflyModule):
    """Writes down the scale of the loss after every step."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.global_rank == 0:
            scale = self.trainer.strategy.deepspeed_engine.optimizer.loss_scaler.cur_scale
            with (Path(self.trainer.default_root_dir) / "scales.txt").open("a") as file:
                print(self.global_step, scale, file=file)


class HalfPrecision(ZeroStrategy):
    """Computes in fp16 on any processor; slow ones emulate it, and DeepSpeed therefore refuses them."""

    def setup_environment(self):
        super().setup_environment()
        from deepspeed.accelerator import get_accelerator

        self._asked, get_accelerator().is_fp16_supported = get_accelerator().is_fp16_supported, lambda: True

    def teardown(self):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = self._asked
        super().teardown()


def save_weights(module: FireflyModule) -> None:
    import deepspeed

    weights = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().float().clone()
    heads = module.model.get_input_embeddings().weight, module.model.get_output_embeddings().weight
    assert heads[0] is heads[1]
    if module.global_rank == 0:
        torch.save(weights, Path(module.trainer.default_root_dir) / "drawn.pt")


def command(verb: str, strategy: str, folder: Path, rows: Path, root: Path, *more: object, model: str = "") -> list:
    root.mkdir(parents=True, exist_ok=True)
    return [
        *("firefly-fit", verb, *(["--model", model] if model else []), "--model.path", folder),
        *("--data.train_files", rows, "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu"),
        *("--trainer.devices", 2, "--trainer.enable_progress_bar", "false", "--trainer.strategy", strategy),
        *("--data.batch_size", 8, *more),
    ]


def steps(count: int, warmup: int = 2) -> list[object]:
    return ["--trainer.max_steps", count, "--model.learning_rate", 1e-3, "--model.warmup_steps", warmup]


def constant_rate() -> list[object]:
    """A schedule that does not depend on the last step."""
    return ["--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor", 1.0]


@pytest.fixture(scope="module")
def config_files(tmp_path_factory) -> dict[str, Path]:
    """Files of DeepSpeed's configuration."""
    folder = tmp_path_factory.mktemp("configs")
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 12345}
    contents = {
        "full": {  # agrees with the plan, and leaves to the trainer what it may
            "zero_optimization": offload | {"stage3_prefetch_bucket_size": "auto"},
            "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": 8,
            "gradient_clipping": 0.1, "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        },
        "optimizer": {
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "adam_w_mode": True}},
            "scheduler": {"type": "WarmupLR", "params": {
                "warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear"}},
        },
    }  # fmt: skip
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: folder / f"{name}.json" for name in contents}


def by_config(file: Path) -> str:
    return json.dumps({"class_path": "firefly_lightning.strategies.ZeroStrategy", "init_args": {"config": str(file)}})


RANDOM = {"drawn-2", "drawn-3", "drawn-bf16", "own-2", "own-3", "ungathered", "own-ungathered"}
LEFT_OUT = {*RANDOM, "half-2", "twice", "optimizer"} if DIVIDED else set()
"""Runs whose tests `OF_FULL_RUNS` names."""


@pytest.fixture(scope="module")
def runs(odd_folder, rows_file, config_files, tmp_path_factory) -> Path:
    """Runs of three steps, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("runs")
    commands = []

    def add(name: str, strategy: str, *more: object, model: str = "") -> None:
        if name not in LEFT_OUT:
            own = [folder / name, *more, *steps(3)]
            commands.append(command("fit", strategy, odd_folder, rows_file, *own, model=model))

    two = ["--data.micro_batch_size", 2]
    for stage in (2, 3):
        scratch = ["--model.from_scratch", "true"]
        add(f"drawn-{stage}", f"zero{stage}", *scratch, model=f"{HERE}.Drawn")
        add(f"own-{stage}", f"zero{stage}", model=f"{HERE}.OwnModel")
        half = ["--trainer.strategy.stage", stage, "--trainer.strategy.initial_scale_power", 8]
        add(f"half-{stage}", f"{HERE}.HalfPrecision", *half, *two, "--trainer.precision", "16-mixed")
    scaled = ["--trainer.strategy", f"{HERE}.HalfPrecision", *("--trainer.strategy.initial_scale_power", 8)]
    scaled += ["--trainer.strategy.loss_scale_window", 2, "--trainer.precision", "16-mixed"]
    for name, stage, more in (
        ("scaled", 2, ["--trainer.max_steps", 9]),
        ("scaled-part", 2, ["--trainer.max_steps", 5]),
        ("scaled-moved", 3, ["--trainer.max_steps", 9, "--ckpt_path", folder / "scaled-part" / "checkpoints"]),
    ):
        own = [*scaled, "--trainer.strategy.stage", stage, *constant_rate(), *more]
        commands.append(command("fit", "zero2", odd_folder, rows_file, folder / name, *own, model=f"{HERE}.Scaled"))
    add("drawn-bf16", "zero3", *scratch, "--trainer.precision", "bf16-mixed", model=f"{HERE}.Drawn")
    ungathered = [f"{HERE}.Ungathered", "--trainer.strategy.stage", 3]
    add("ungathered", *ungathered, *scratch)
    add("own-ungathered", *ungathered, model=f"{HERE}.OwnModel")
    add("once", "zero2", *two)
    add("twice", f"{HERE}.DividingTwice", "--trainer.strategy.stage", 2, *two)
    clipped = [*two, "--trainer.gradient_clip_val", 0.1]
    add("offload", "zero3_offload", *clipped, model=f"{HERE}.Inspected")
    add("full", by_config(config_files["full"]), *two, model=f"{HERE}.Inspected")
    add("optimizer", by_config(config_files["optimizer"]), *two, model=f"{HERE}.Inspected")
    run_ranks(2, *commands)
    return folder


def drawn(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(runs / name / "drawn.pt")


def test_random_weights_under_stage_3_are_those_of_one_device(runs):
    whole, sharded = drawn(runs, "drawn-2"), drawn(runs, "drawn-3")  # stage 2 shards after construction
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in sharded.items())


@pytest.mark.parametrize("run", ["drawn-3", "drawn-bf16"])
def test_random_weights_under_stage_3_have_the_right_distribution(runs, run):
    assert float(logged(runs / run)[0]) == pytest.approx(math.log(1499), rel=0.02)
    for name, weight in drawn(runs, run).items():
        if "layernorm" in name or "ln_f" in name or name.endswith("bias"):
            assert (weight == name.endswith("weight")).all(), name
        else:
            sampling_error = 5 * 0.02 / math.sqrt(2 * weight.numel())
            assert abs(float(weight.std()) - 0.02) < sampling_error, name


def test_a_users_own_model_is_drawn_as_on_one_device(runs):
    whole, sharded = drawn(runs, "own-2"), drawn(runs, "own-3")
    assert all(torch.equal(weight, whole[name]) for name, weight in sharded.items())
    assert "plain.weight" in sharded


def test_without_help_random_weights_under_stage_3_are_wrong(runs):
    """If this fails, transformers or DeepSpeed have mended it: take deepspeed_init's wrappers out."""
    if not transformers.__version__.startswith("4."):
        assert float(logged(runs / "ungathered")[0]) > 2 * math.log(1499)
    whole, sharded = drawn(runs, "own-2"), drawn(runs, "own-ungathered")
    name = "model.transformer.h.0.attn.c_proj.weight"
    assert float(sharded[name].std()) > 1.5 * float(whole[name].std())


def test_without_help_accumulated_gradients_are_divided_twice(runs):
    """If this fails, Lightning or DeepSpeed have mended it: take `scale_wrt_gas` and `check_accumulation` out."""
    once, twice = (float(logged(runs / name, "grad_norm")[0]) for name in ("once", "twice"))
    assert twice == pytest.approx(once / 2, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_trains_with_its_scale_undone_in_the_norm(runs, stage):
    for name, tolerance in (("train_loss", 1e-3), ("grad_norm", 1e-2)):
        half, full = (list(map(float, logged(runs / run, name).values())) for run in (f"half-{stage}", "once"))
        assert half == pytest.approx(full, rel=tolerance)


def test_the_scale_of_fp16_goes_on_from_a_portable_checkpoint_of_another_stage(runs):
    scales = {
        name: dict(line.split() for line in (runs / name / "scales.txt").read_text().splitlines())
        for name in ("scaled", "scaled-moved")
    }
    assert len(set(scales["scaled"].values())) > 2, "it changes, before the move and after"
    assert scales["scaled-moved"] == {step: scale for step, scale in scales["scaled"].items() if int(step) > 5}
    whole, moved = (logged(runs / name) for name in scales)
    assert {step: float(loss) for step, loss in moved.items()} == pytest.approx(
        {step: float(whole[step]) for step in moved}, rel=1e-4
    )


def test_a_full_configuration_holds_and_is_completed(runs):
    assert logged(runs / "full") == logged(runs / "offload")
    found, usual = (json.loads((runs / name / "facts.json").read_text()) for name in ("full", "offload"))
    assert usual == {
        "stage": 3, "bucket": 200_000_000, "rows": 2, "accumulated": 2, "clip": 0.1, "optimizer": "DeepSpeedCPUAdam",
        "decoupled": True, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip
    assert found == usual | {"bucket": 12345}


def test_optimizer_and_schedule_of_a_configuration_hold(runs):
    rates = [float(rate) for rate in logged(runs / "optimizer", "lr").values()]
    assert rates[1:] == [0.0, 1e-3 / 4]  # DeepSpeed's schedules begin with the second step
    assert json.loads((runs / "optimizer" / "facts.json").read_text())["rows"] == 2
