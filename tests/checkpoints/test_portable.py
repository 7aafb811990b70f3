"""Portable checkpoints: what is in them, damage that is found, what holds on resume, and signals."""

import os
import random
import re
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BloomForCausalLM

from firefly_lightning import FireflyModule
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.manifest import entry_of, write_manifest
from tests.support.choice import DIVIDED
from tests.support.helpers import PATIENCE, ROOT, Stopping, fit, forked, logged, one_line, raised_line, run
from tests.support.ranks import run_rank

STEPS, HALF = 8, 5
RUN = ["--data.batch_size", 8, "--model.warmup_steps", 3, "--model.learning_rate", 1e-3, "--trainer.max_steps", STEPS]
STOPPED = ["--model", "tests.support.helpers.Stopping", "--model.stop_step", HALF - 1]


class WithMore(Stopping):
    """A weight and a buffer around the model, and a frozen part of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(2))

    def configure_model(self):
        super().configure_model()
        self.model.transformer.ln_f.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx) * self.scale.mean()


class Two(FireflyModule):
    """Two optimizers, whose states no portable checkpoint has names for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        self.step_guard.forget()

    def configure_optimizers(self):
        halves = list(self.parameters())[::2], list(self.parameters())[1::2]
        return [torch.optim.SGD(half, lr=1e-3) for half in halves]


@pytest.fixture(scope="module")
def runs(model_folder, rows_file, tmp_path_factory) -> Path:
    """`whole`, and `part`, which was stopped."""
    root = tmp_path_factory.mktemp("runs")
    fit(model_folder, rows_file, root / "whole", *RUN)
    fit(model_folder, rows_file, root / "part", *RUN, *STOPPED)
    return root


@pytest.fixture
def checkpoint(runs, tmp_path) -> Path:
    return shutil.copytree(runs / "part" / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")


def state(checkpoint: Path) -> dict:
    return torch.load(checkpoint / "trainer.ckpt", weights_only=True)


def test_weights_and_states_go_by_hugging_face_names(checkpoint, model_folder):
    """Hugging Face's own reader takes them, given the configuration; the head is the embedding, and there once."""
    (checkpoint / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    model, info = BloomForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = load_file(checkpoint / "model-0-0.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()
    states = load_file(checkpoint / "optimizer-0-0.safetensors")
    assert states.keys() == {f"{key}/model.{name}" for name in weights for key in ("exp_avg", "exp_avg_sq")}
    assert all(states[f"exp_avg/model.{name}"].shape == weight.shape for name, weight in weights.items())


def test_a_damaged_byte_or_end_of_any_file_is_found_and_named(checkpoint):
    chance = random.Random(0)
    names = [path.name for path in checkpoint.iterdir()]
    assert sorted(names) == [
        "checkpoint.json", "model-0-0.safetensors", "model.safetensors.index.json", "optimizer-0-0.safetensors",
        "trainer.ckpt",
    ]  # fmt: skip
    for name in names:
        file = checkpoint / name
        whole = file.read_bytes()
        flips = [
            (place, bytes([whole[place] ^ 1 << chance.randrange(8)])) for place in (0, len(whole) // 3, len(whole) - 9)
        ]
        damaged = [whole[:place] + byte + whole[place + 1 :] for place, byte in flips]
        for contents in (*damaged, whole[:-1], whole[: len(whole) // 2], b"", None):
            file.unlink()
            if contents is not None:
                file.write_bytes(contents)
            with pytest.raises(FireflyError) as raised:
                AtomicCheckpointIO().load_checkpoint(checkpoint)
            assert raised_line(raised).startswith(f"{file}: ")
            file.write_bytes(whole)
    AtomicCheckpointIO().load_checkpoint(checkpoint)


def test_every_command_names_the_damaged_file(checkpoint, model_folder, rows_file, tmp_path):
    file = checkpoint / "optimizer-0-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    line = one_line(fit(model_folder, rows_file, tmp_path / "run", *RUN, "--ckpt_path", checkpoint, check=False))
    assert line.startswith(f"{file}: damaged, it has ")


def relist(checkpoint: Path, changes: dict | None = None, version: int = 1) -> None:
    """Changes what `trainer.ckpt` holds, and the manifest with it, as somebody would who knows the form."""
    torch.save(state(checkpoint) | (changes or {}), checkpoint / "trainer.ckpt")
    entries = {file.name: entry_of(file) for file in checkpoint.iterdir() if file.name != "checkpoint.json"}
    write_manifest(checkpoint / "checkpoint.json", entries, format=version)


def test_a_changed_byte_of_a_single_file_ends_every_command_in_a_line(model_folder, rows_file, tmp_path):
    own = [*RUN, "--checkpoint.portable", "false", "--trainer.max_steps"]
    fit(model_folder, rows_file, tmp_path, *own, 2)
    file = tmp_path / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    fit(model_folder, rows_file, tmp_path / "sound", *own, 3, "--ckpt_path", file)
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    for result in (
        fit(model_folder, rows_file, tmp_path, *own, 4, "--ckpt_path", "last", check=False),
        run("firefly", "export", "--checkpoint", file, "--out", tmp_path / "out", check=False),
    ):
        assert one_line(result) == f"{file}: damaged, its contents have changed; use an earlier checkpoint"
    assert not (tmp_path / "out").exists()


def test_a_later_format_is_refused(checkpoint):
    relist(checkpoint, version=2)
    with pytest.raises(FireflyError, match="format 2; this release reads 1"):
        AtomicCheckpointIO().load_checkpoint(checkpoint)


CONFIGURATIONS = {
    "Python tag": "a: !!python/object/apply:os.system [touch ran]",
    "bomb": "x0: &x0 [1]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 20)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_is_only_shown_ends_no_run(name, runs, checkpoint, model_folder, rows_file, tmp_path):
    relist(checkpoint, {"configuration": CONFIGURATIONS[name]})
    fit(model_folder, rows_file, tmp_path, *RUN, "--ckpt_path", checkpoint, "--trainer.max_steps", HALF + 1)
    assert logged(tmp_path) == {HALF: logged(runs / "whole")[HALF]}
    assert not (ROOT / "ran").exists()


def test_a_step_that_is_no_number_ends_a_run_in_a_line(checkpoint, model_folder, rows_file, tmp_path):
    relist(checkpoint, {"global_step": "5"})
    line = one_line(fit(model_folder, rows_file, tmp_path / "run", *RUN, "--ckpt_path", checkpoint, check=False))
    expected = "its global_step is str, not a number of steps; use an earlier checkpoint"
    assert line == f"{checkpoint / 'trainer.ckpt'}: {expected}"


def test_a_folder_a_file_in_it_and_last_mean_the_same(checkpoint):
    for path in (checkpoint, checkpoint / "trainer.ckpt", checkpoint / "checkpoint.json", checkpoint.parent / "last"):
        assert find_checkpoint(str(path)) == checkpoint


def test_a_checkpoint_that_was_being_removed_is_not_taken(checkpoint):
    """The new one has its name already; removing a file from the old one makes that the younger folder."""
    replaced = checkpoint.with_name(".last.ckpt.replaced")
    shutil.copytree(checkpoint, replaced)
    (replaced / "trainer.ckpt").unlink()
    assert find_checkpoint(str(checkpoint.parent)) == checkpoint
    shutil.rmtree(replaced)
    checkpoint.rename(replaced)
    assert find_checkpoint(str(checkpoint.parent)) == find_checkpoint(str(checkpoint)) == replaced


def test_neither_schedule_nor_count_of_steps_changes(runs, checkpoint, model_folder, rows_file, tmp_path):
    result = fit(
        model_folder, rows_file, tmp_path / "resumed", *RUN, "--ckpt_path", checkpoint / "trainer.ckpt", process=True
    )
    for metric in ("train_loss", "lr", "grad_norm"):
        expected = {step: value for step, value in logged(runs / "whole", metric).items() if step >= HALF}
        assert logged(tmp_path / "resumed", metric) == expected, metric
    ends = [state(root / "checkpoints" / "last.ckpt") for root in (runs / "whole", tmp_path / "resumed")]
    assert ends[0]["optimizer_scalars"] == ends[1]["optimizer_scalars"] == {"all": {"step": STEPS}, "own": {}}
    schedules = [{key: end["lr_schedulers"][0][key] for key in ("last_epoch", "base_lrs", "_last_lr")} for end in ends]
    assert schedules[0] == schedules[1]
    for name in ("model-0-0.safetensors", "optimizer-0-0.safetensors"):
        files = [
            (root / "checkpoints" / "last.ckpt" / name).read_bytes() for root in (runs / "whole", tmp_path / "resumed")
        ]
        assert files[0] == files[1]
    shown = (result.stdout + result.stderr).split("Resumed with other settings, which hold from here on:\n")[1]
    rows = [line.split() for line in shown.splitlines()[:4]]
    assert rows[0] == ["setting", "checkpoint", "this", "run"]
    assert [row[0] for row in rows[1:]] == ["trainer.default_root_dir", "model.class_path", "model.init_args.stop_step"]


CHANGED = ["--model.learning_rate", 2e-3, "--model.warmup_steps", 0]
OWN = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.weight_decay", 0.1, "--model.optimizer.lr"]
STEPWISE = ["--model.lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--model.lr_scheduler.gamma", 0.5]


def test_the_configuration_wins_over_the_checkpoint_and_the_change_is_shown(
    checkpoint, model_folder, rows_file, tmp_path
):
    changed = fit(model_folder, rows_file, tmp_path / "a", *RUN, *CHANGED, "--ckpt_path", checkpoint, process=True)
    fit(model_folder, rows_file, tmp_path / "b", *RUN, *CHANGED)
    expected = {step: rate for step, rate in logged(tmp_path / "b", "lr").items() if step >= HALF}
    assert logged(tmp_path / "a", "lr") == expected
    assert re.search(r"model\.init_args\.learning_rate +0\.001 +0\.002\n", changed.stdout + changed.stderr)
    assert re.search(r"model\.init_args\.warmup_steps +3 +0\n", changed.stdout + changed.stderr)


def test_a_schedule_goes_on_from_another_learning_rate(model_folder, rows_file, tmp_path):
    common = [*RUN, *STEPWISE, *OWN]
    fit(model_folder, rows_file, tmp_path / "a", *common, 1e-3, *STOPPED)
    fit(model_folder, rows_file, tmp_path / "b", *common, 3e-3, "--ckpt_path", tmp_path / "a" / "checkpoints")
    rates = {step: float(rate) for step, rate in logged(tmp_path / "b", "lr").items()}
    assert rates == pytest.approx({step: 3e-3 * 0.5**step for step in range(HALF, STEPS)})


def test_what_a_module_has_around_the_model_is_kept(model_folder, rows_file, tmp_path):
    more = ["--model", "tests.checkpoints.test_portable.WithMore"]
    fit(model_folder, rows_file, tmp_path / "part", *RUN, *more, "--model.stop_step", HALF - 1)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    around = load_file(last / "module-0-0.safetensors")
    assert around["seen"].tolist() == [HALF, HALF]
    assert around["scale"].shape == (3,)
    assert not any("ln_f" in name for name in load_file(last / "optimizer-0-0.safetensors"))
    fit(model_folder, rows_file, tmp_path / "part", *RUN, *more, "--model.stop_step", 99, "--ckpt_path", "last")
    assert load_file(last / "module-0-0.safetensors")["seen"].tolist() == [STEPS, STEPS]


def test_two_optimizers_are_saved_in_a_file(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *RUN, "--model", "tests.checkpoints.test_portable.Two")
    assert len(torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]) == 2


def test_states_that_cannot_be_split_are_refused_where_weights_are(model_folder, rows_file, tmp_path):
    command = [*RUN, "--model.optimizer", "torch.optim.Adafactor", "--trainer.max_steps", 2]
    fit(model_folder, rows_file, tmp_path, *command)
    moved = ["--trainer.strategy", "fsdp2", "--ckpt_path", "last", "--trainer.max_steps", 4]
    line = one_line(fit(model_folder, rows_file, tmp_path, *RUN, *moved, check=False))
    assert "is not shaped like the weight, and cannot be split; resume under auto or ddp, or " in line
    line = one_line(fit(model_folder, rows_file, tmp_path, *command, *moved, check=False))
    assert line.startswith("model.optimizer: this strategy updates parts of weights, which Adafactor cannot do")


def test_the_last_few_are_kept(model_folder, rows_file, tmp_path):
    keep = ["--checkpoint.keep", 3, "--checkpoint.every_n_steps", 2]
    fit(model_folder, rows_file, tmp_path, *RUN, *keep, "--trainer.max_steps", 7)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=4.ckpt", "step=6.ckpt", "step=7.ckpt"]
    assert state(folder / "last.ckpt")["global_step"] == 7
    fit(model_folder, rows_file, tmp_path, *RUN, *keep, "--ckpt_path", "last")
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=6.ckpt", "step=7.ckpt", "step=8.ckpt"]
    (folder / "last.ckpt").unlink()
    assert find_checkpoint(str(folder / "last")) == folder / "step=8.ckpt"


def started(model: Path, rows: Path, root: Path, *args: object, **environment: str) -> tuple[BaseProcess, Path]:
    """A run that has taken three steps of very many, and the file of what it prints."""
    command = [
        "firefly-fit", "fit", "--model.path", model, "--data.train_files", rows, "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", root, "--trainer.enable_progress_bar", "false", "--trainer.devices", 1, *RUN,
        "--trainer.max_steps", 100000, *args,
    ]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    output = root / "output"
    process = forked(run_rank, [[str(part) for part in command]], os.environ | own | environment, output, output, ROOT)
    end = time.monotonic() + PATIENCE
    while not (root / "lightning_logs/version_0/metrics.csv").exists() or len(logged(root)) < 3:
        assert process.is_alive(), output.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    return process, output


TWO = ["--trainer.strategy", "ddp", "--trainer.devices", 2]


@pytest.mark.parametrize(
    ("number", "places"),
    [(signal.SIGINT, []), (signal.SIGTERM, TWO), *([] if DIVIDED else [(signal.SIGTERM, []), (signal.SIGINT, TWO)])],
)
def test_a_signal_saves_the_step_and_ends_with_its_code(number, places, model_folder, rows_file, tmp_path):
    process, output = started(model_folder, rows_file, tmp_path, *places)
    os.kill(process.pid, number)
    process.join(60)
    said, code = output.read_text(), process.exitcode
    process.kill()  # a run that goes on would hold up the end of the tests
    assert code == 128 + number, said
    assert f"Ended by {number.name}; the last step is saved, resume with --ckpt_path last" in said
    assert "Traceback" not in said
    step = max(logged(tmp_path)) + 1
    assert state(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == step
    fit(model_folder, rows_file, tmp_path, *RUN, "--trainer.max_steps", step + 2, "--ckpt_path", "last")
    assert sorted(logged(tmp_path)) == list(range(step + 2))


def test_slurm_requeues_a_saved_run(model_folder, rows_file, tmp_path):
    """SLURM sends its signal to the job, which has itself requeued; the run that starts then goes on by itself."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
           "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
           "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}  # fmt: skip
    process, output = started(model_folder, rows_file, tmp_path, **job)
    os.kill(process.pid, signal.SIGUSR1)
    while not (tmp_path / "requeued").exists():
        assert process.is_alive(), output.read_text()
        time.sleep(0.1)
    process.kill()  # what SLURM does then
    process.join()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (saved,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    step = state(saved)["global_step"]
    environment = {name: value for name, value in job.items() if name != "PATH"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fit(model_folder, rows_file, tmp_path, *RUN, "--trainer.max_steps", step + 2, process=True)
    assert sorted(logged(tmp_path)) == list(range(step + 2))


class NotingMaps(FireflyModule):
    """Notes after its first step which files of checkpoints the process holds."""

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        maps = Path("/proc/self/maps").read_text()
        held = sorted({line.split()[5] for line in maps.splitlines() if ".ckpt/" in line})
        Path(self.trainer.default_root_dir, f"held-{self.global_rank}").write_text("\n".join(held))


@pytest.mark.parametrize("places", [[], TWO, ["--trainer.strategy", "zero2", "--trainer.devices", 2]])
def test_a_resumed_run_holds_no_file_of_its_checkpoint(places, checkpoint, model_folder, rows_file, tmp_path):
    """A file that is held takes room on the disk for as long as the run lasts, also when it has been replaced."""
    own = ["--model", "tests.checkpoints.test_portable.NotingMaps", "--ckpt_path", checkpoint, *places]
    fit(model_folder, rows_file, tmp_path, *RUN, *own, "--trainer.max_steps", HALF + 1, process=True)
    assert (tmp_path / "held-0").read_text() == ""
