"""PyTorch's own strategies: both kinds of checkpoints, what they refuse, and FSDP2 around tensor parallelism."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies import FSDP2Strategy, NativeTensorParallelStrategy
from firefly_lightning.strategies.native.dtensors import local, norm
from tests.integration.test_parity import REFUSED, differences, relative
from tests.support.choice import DIVIDED
from tests.support.damage import assert_damage_is_found
from tests.support.helpers import logged, one_line, raised_line, run, run_forked, run_ranks

STEPS = 8
CLASSES = {"fsdp2": FSDP2Strategy, "native_tp": NativeTensorParallelStrategy}
MICRO_BATCH_SIZE = {"fsdp2": 2, "native_tp": 4, "auto": 4}  # two of them a step
FOLDER = {"save_distributed_checkpoint": True}
METRICS = ("train_loss", "val_loss", "grad_norm", "lr")


def spelled_out(name: str, **init_args: object) -> str:
    """A strategy as a YAML file names it."""
    cls = CLASSES[name]
    return json.dumps({"class_path": f"firefly_lightning.strategies.{cls.__name__}", "init_args": init_args})


@pytest.fixture(scope="module")
def dropout_folder(odd_folder, tmp_path_factory) -> Path:
    """Dropout shows whether the random state is the same after resuming."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(odd_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout": 0.1}))
    return folder


def command(verb: str, name: str, model: Path, rows: Path, root: Path, *more: object) -> list[object]:
    """A schedule that does not depend on where a run is meant to end; a validation in the middle and at the end."""
    return [
        *("firefly-fit", verb, "--model.path", model, "--trainer.default_root_dir", root),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.devices", 2),
        *("--data.batch_size", 8, "--data.micro_batch_size", MICRO_BATCH_SIZE[name], "--trainer.strategy", name),
        *("--data.train_files", rows, "--data.val_fraction", 0.25),
        *(FIT if verb == "fit" else []),
        *more,
    ]


FIT = [
    *("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 1e-3, "--trainer.max_steps", STEPS),
    *("--model.lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--model.lr_scheduler.gamma", 0.8),
    *("--trainer.val_check_interval", STEPS // 2, "--trainer.check_val_every_n_epoch", "null"),
    *("--checkpoint.portable", "false"),
]
PORTABLE = ["--checkpoint.portable", "true"]
HALF = ["--trainer.max_steps", STEPS // 2]
VALUE = ["--trainer.gradient_clip_val", 1e-3, "--trainer.gradient_clip_algorithm", "value"]
KINDS = {"file": ({}, []), "folder": (FOLDER, []), "portable": ({}, PORTABLE)}
VARIANTS = {
    "by-value": VALUE,
    "recomputed": ["--model.gradient_checkpointing", "true"],
    "from-scratch": ["--model.from_scratch", "true", *HALF],
    "bf16-true": ["--model.from_scratch", "true", "--trainer.precision", "bf16-true", *HALF],
}


LEFT_OUT = {"fsdp2": {"from-scratch"}, "native_tp": {"file", "portable", "recomputed", "bf16-true"}} if DIVIDED else {}
"""Kinds of runs that one strategy leaves to the other, whose code is the same; `OF_FULL_RUNS` has the tests of them."""


def kept(name: str, *kinds: str) -> list[str]:
    return [kind for kind in kinds if kind not in LEFT_OUT.get(name, ())]


@pytest.fixture(scope="module")
def alone(odd_folder, rows_file, tmp_path_factory) -> Path:
    """The same runs on one device, whose folders bear the names of their kinds."""
    root = tmp_path_factory.mktemp("alone")
    for kind, more in {"whole": [], "half": HALF, "by-value": VALUE}.items():
        run(*command("fit", "auto", odd_folder, rows_file, root / kind, "--trainer.devices", 1, *more))
    return root


@pytest.fixture(scope="module", params=[name for name in CLASSES if name not in REFUSED])
def runs(request, odd_folder, dropout_folder, rows_file, alone, tmp_path_factory) -> tuple[str, Path]:
    """A strategy, and what it did, all in the same two processes."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)

    def on(verb: str, model: Path, kind: str, *more: object) -> list[object]:
        return command(verb, name, model, rows_file, root / kind, *more)

    commands = [on("fit", dropout_folder, "whole")]
    for kind in kept(name, *KINDS):
        given, more = KINDS[kind]
        own, half = ["--trainer.strategy", spelled_out(name, **given)], root / kind / "checkpoints" / "last.ckpt"
        commands += [
            on("fit", dropout_folder, kind, *own, *HALF, *more),
            on("validate", dropout_folder, kind, *own, "--ckpt_path", "last"),
            on("fit", dropout_folder, f"{kind}-resumed", *own, "--ckpt_path", half),
        ]
    as_folder = ["--trainer.strategy", spelled_out(name, **FOLDER), "--ckpt_path", "last"]
    commands += [
        *(on("fit", dropout_folder, kind, *as_folder) for kind in kept(name, "file")),  # its name becomes a folder's
        on("fit", odd_folder, "half", *HALF),
        on("fit", odd_folder, "moved", "--ckpt_path", alone / "half" / "checkpoints" / "last.ckpt"),
        *(on("fit", odd_folder, kind, *VARIANTS[kind]) for kind in kept(name, *VARIANTS)),
    ]
    run_ranks(2, *commands)
    return name, root


def weights(root: Path) -> dict[str, torch.Tensor]:
    """Of the model that the last checkpoint of a run exports to."""
    if not (root / "exported").exists():
        run("firefly", "export", "--checkpoint", root / "checkpoints", "--out", root / "exported")
    return BloomForCausalLM.from_pretrained(root / "exported").state_dict()


def values(root: Path, metric: str, version: int = 0, first: int = 0) -> dict[int, str]:
    return {step: value for step, value in logged(root, metric, version).items() if step >= first}


@pytest.mark.parametrize("kind", ["file-resumed", "folder-resumed", "portable-resumed", "file"])
def test_a_stopped_run_goes_on_digit_for_digit(runs, kind):
    _, root = runs
    for metric in METRICS:
        first = 0 if kind == "file" else STEPS // 2  # which went on in its own folder
        assert values(root / kind, metric) == values(root / "whole", metric, first=first), metric
    expected = weights(root / "whole")
    for name, value in weights(root / kind).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_validates_as_it_did_in_its_run(runs, kind):
    _, root = runs
    expected = next(iter(values(root / kind, "val_loss").values()))  # that of the first half
    assert list(values(root / kind, "val_loss", version=1).values()) == [expected]
    assert expected in values(root / "whole", "val_loss").values()


def test_checkpoints_are_what_was_asked_for(runs):
    name, root = runs
    assert (root / "whole" / "checkpoints" / "last.ckpt").is_file()
    for kind in kept(name, "folder", "file"):
        files = sorted(path.name for path in (root / kind / "checkpoints" / "last.ckpt").iterdir())
        assert files == ["digests.json", "rank-0.pt", "rank-1.pt", "trainer.ckpt"]
    whole = (root / "whole" / "checkpoints" / "last.ckpt").stat().st_size
    part = (root / "folder" / "checkpoints" / "last.ckpt" / "rank-0.pt").stat().st_size
    assert part < 0.6 * whole, "weights and optimizer states are in parts, the embedding once"


def test_a_changed_byte_of_any_file_is_found(runs, tmp_path):
    _, root = runs
    assert_damage_is_found(root / "folder" / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")


def test_runs_move_to_one_device_and_back(runs, alone, odd_folder, rows_file):
    _, root = runs
    back, half = root / "back", root / "half" / "checkpoints" / "last.ckpt"
    run(*command("fit", "auto", odd_folder, rows_file, back, "--trainer.devices", 1, "--ckpt_path", half))
    for metric in METRICS:
        expected = values(alone / "whole", metric, first=STEPS // 2)
        for moved in (back, root / "moved"):
            found = values(moved, metric)
            assert found.keys() == expected.keys()
            assert all(relative(float(found[at]), float(expected[at])) < 1e-5 for at in found), f"{moved}: {metric}"


@pytest.mark.parametrize(("kind", "like"), [("by-value", "by-value"), ("recomputed", "whole")])
def test_options_of_training(runs, alone, kind, like):
    _, root = runs
    found, expected = values(root / kind, "train_loss"), values(alone / like, "train_loss")
    assert found.keys() == expected.keys()
    assert all(relative(float(found[step]), float(expected[step])) < 1e-5 for step in found)


@pytest.mark.parametrize("kind", ["from-scratch", "bf16-true"])
def test_random_weights_know_nothing_yet(runs, kind):
    _, root = runs
    assert float(values(root / kind, "train_loss")[0]) == pytest.approx(math.log(1499), rel=0.02)
    weights(root / kind)
    stored = load_file(root / kind / "exported" / "model.safetensors")
    dtype = torch.bfloat16 if kind == "bf16-true" else torch.float32
    assert {value.dtype for value in stored.values()} == {dtype}


def test_parts_fit_the_same_processes_only(runs, dropout_folder, rows_file, tmp_path):
    name, root = runs
    folder = root / "folder" / "checkpoints" / "last.ckpt"
    resume = command("fit", name, dropout_folder, rows_file, tmp_path, "--trainer.devices", 1, "--ckpt_path", folder)
    message = one_line(run(*resume, check=False, how=run_forked))
    assert message.startswith(f"{folder}: was saved otherwise (mesh [")

    copy = shutil.copytree(folder, tmp_path / "last.ckpt")
    (copy / "rank-1.pt").write_bytes((copy / "rank-1.pt").read_bytes()[:-1000])
    exported = run("firefly", "export", "--checkpoint", copy, "--out", tmp_path / "exported", check=False)
    assert one_line(exported).startswith(f"{copy / 'rank-1.pt'}: damaged")


@pytest.mark.parametrize("name", CLASSES)
def test_a_damaged_model_ends_all_processes_with_one_line(name, odd_folder, rows_file, tmp_path):
    model = shutil.copytree(odd_folder, tmp_path / "model")
    (model / "model.safetensors").write_bytes((odd_folder / "model.safetensors").read_bytes()[:-1000])
    result = run(*command("fit", name, model, rows_file, tmp_path, *HALF), check=False, how=run_forked)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (message,) = {line.split(": error: ")[1] for line in result.stderr.splitlines() if ": error: " in line}
    assert REFUSED.get(name, f"{model}: the weights cannot be read") in message


def test_fsdp2_goes_around_tensor_parallelism(fit_args, expected, tmp_path):
    """Two by two; a vocabulary of 1,499 is no multiple of either."""
    strategy = spelled_out("native_tp", tensor_parallel_size=2, **FOLDER)
    own = ["--trainer.strategy", strategy, "--trainer.devices", 4, "--checkpoint.portable", "false"]
    fit = fit_args(tmp_path, 1e-4, *own, "--data.micro_batch_size", 2)
    if REFUSED:
        with pytest.raises(AssertionError, match=REFUSED["fsdp2"]):
            run_ranks(4, fit)
        return
    run_ranks(4, fit)
    assert not differences(tmp_path, expected[1e-4], 1e-4, "32-true")
    assert len(list((tmp_path / "checkpoints" / "last.ckpt").glob("rank-*.pt"))) == 4


@pytest.mark.parametrize(
    ("strategy", "more", "message"),
    [
        (spelled_out("native_tp", tensor_parallel_size=2), [], "must be the 1 processes of the run"),
        ("native_tp", ["--trainer.precision", "64-true"], "native_tp: cannot do precision 64-true"),
        ("fsdp2", ["--trainer.precision", "64-true"], "fsdp2: cannot do precision 64-true"),
    ],
)
def test_what_cannot_be_is_refused_first(strategy, more, message, tmp_path, rows_file, odd_folder):
    """The weights, which cannot be loaded, are not even looked at."""
    own = ["--trainer.devices", 1, "--trainer.strategy", strategy, *more]
    broken = shutil.copytree(odd_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_text("nothing that can be loaded")
    result = run(*command("fit", "auto", broken, rows_file, tmp_path, *own), check=False)
    assert message in one_line(result)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(FireflyError) as raised:
        NativeTensorParallelStrategy(tensor_parallel_size=4).check_model(BloomConfig(n_head=6))
    assert raised_line(raised) == "native_tp: tensor_parallel_size 4 does not divide the model's 6 heads"


@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_optimizers_of_many_tensors_are_refused(option):
    optimizer = torch.optim.AdamW([Parameter(torch.zeros(1))], **{option: True})
    with pytest.raises(FireflyError, match=f"AdamW cannot be {option}"):
        NativeTensorParallelStrategy(tensor_parallel_size=2).convert_optimizer(optimizer)
    assert FSDP2Strategy().convert_optimizer(optimizer) is optimizer


@pytest.fixture
def mixture():
    """Gradients of which one is in parts, here a single one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tensor_parallel",))
    split, plain = Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])), Parameter(torch.zeros(3))
    split.grad, plain.grad = DTensor.from_local(torch.full((3,), 2.0), mesh, [Shard(0)]), torch.full((3,), 4.0)
    yield [split, plain]
    dist.destroy_process_group()


def test_pytorch_does_not_do_mixtures_itself(mixture):
    """Where it does, clipping and the refusal of `foreach` can go."""
    with pytest.raises(RuntimeError, match="got mixed"):
        torch.nn.utils.clip_grad_norm_(mixture, 1.0)
    with pytest.raises(RuntimeError, match="got mixed"):
        torch.optim.AdamW(mixture, foreach=True).step()
    assert norm([parameter.grad for parameter in mixture], torch.device("cpu")).item() == pytest.approx(60**0.5)
    assert local(mixture[0].grad).tolist() == [2.0, 2.0, 2.0]


def test_a_gradient_scaler_is_refused():
    """Lightning itself takes bf16-mixed in its place on a CPU; on a GPU it would scale each process's part alone."""
    strategy = FSDP2Strategy()
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
    strategy.parallel_devices = [torch.device("cpu")]
    with pytest.raises(FireflyError, match="cannot do precision 16-mixed; take bf16-mixed"):
        strategy.setup_environment()
