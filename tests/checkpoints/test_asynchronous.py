"""Saves that do not stop the run: the same files and losses, whole or absent, and every way in which a run can end."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from firefly_lightning import AtomicCheckpointIO
from firefly_lightning.callbacks.checkpoints import LastCheckpoint
from firefly_lightning.checkpoints import host_copies
from firefly_lightning.checkpoints.background import BackgroundSaves, OthersAreGone
from firefly_lightning.checkpoints.host_copies import HostCopies
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import partial_path
from tests.checkpoints.test_portable import RUN, TWO, started, state
from tests.support.choice import DIVIDED
from tests.support.helpers import fit, logged, one_line

SLOW = ["--model", "tests.support.slow_disk.OnASlowDisk", "--model.seconds"]
ASIDE = ["--checkpoint.asynchronous", "true"]
OFTEN = ["--checkpoint.every_n_steps", 2]


@pytest.fixture(scope="module")
def runs(model_folder, rows_file, tmp_path_factory) -> Path:
    """A run that waits for its saves and one that does not, on a disk so slow that every save meets a later step."""
    root = tmp_path_factory.mktemp("runs")
    own = [*RUN, *OFTEN, "--checkpoint.keep", 3, "--data.val_files", rows_file, "--trainer.val_check_interval", 3]
    fit(model_folder, rows_file, root / "waits", *own, *SLOW, 0)
    fit(model_folder, rows_file, root / "aside", *own, *SLOW, 0.2, *ASIDE)
    return root


def writes(root: Path, rank: int = 0) -> list[list[str]]:
    """Of each file of tensors: its checkpoint's name, the step at which it was written, and the checkpoints there."""
    return [line.split() for line in (root / f"writes-{rank}.txt").read_text().splitlines()]


def test_files_and_losses_are_those_of_saves_that_the_run_waits_for(runs):
    for metric in ("train_loss", "grad_norm", "val_loss"):
        assert logged(runs / "aside", metric) == logged(runs / "waits", metric) != {}
    folders = [runs / name / "checkpoints" for name in ("waits", "aside")]
    names = [sorted(file.relative_to(folder) for file in folder.rglob("*")) for folder in folders]
    assert names[0] == names[1]
    compared = [name for name in names[0] if name.suffix == ".safetensors"]
    assert len({name.parent for name in compared}) >= 4, "three kept ones and the best"
    for name in compared:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    for name in {name.parent for name in compared}:
        waited, aside = (state(folder / name) for folder in folders)
        for key in ("optimizer_scalars", "lr_schedulers", "loops", "tied", "tensor_files", "changed_settings"):
            assert waited[key] == aside[key], key
        assert waited["last_step"]["train_loss"] == aside["last_step"]["train_loss"]
    assert [(folder / "last.ckpt").readlink() for folder in folders] == [Path("step=8.ckpt")] * 2


def test_the_run_goes_on_meanwhile_and_nothing_goes_before_it_is_replaced(runs):
    saved_at = {f".step={step}.ckpt.partial": step for step in (2, 4, 6)}
    aside, waits = writes(runs / "aside"), writes(runs / "waits")
    assert any(int(step) > saved_at.get(name, 99) for name, step, *_ in aside)
    assert not any(int(step) > saved_at.get(name, 99) for name, step, *_ in waits)
    seen = [set(there) for _, _, *there in aside]
    first = next(number for number, there in enumerate(seen) if "last.ckpt" in there)
    assert all("last.ckpt" in there for there in seen[first:]), "a link leads to a whole checkpoint at every moment"
    best = next(number for number, there in enumerate(seen) if any(name.startswith("best") for name in there))
    assert all(any(name.startswith("best") for name in there) for there in seen[best:])


@pytest.mark.parametrize("places", [[], TWO])
def test_a_run_that_is_killed_while_it_saves_goes_on_from_a_whole_checkpoint(places, model_folder, rows_file, tmp_path):
    process, _ = started(model_folder, rows_file, tmp_path, *places, *OFTEN, *SLOW, 0.3, *ASIDE)
    last = tmp_path / "checkpoints" / "last.ckpt"
    while not (last.exists() and partial_path(last).exists()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    step = state(find_checkpoint(str(last.parent)))["global_step"]
    assert partial_path(last).exists()
    assert step % 2 == 0
    fit(model_folder, rows_file, tmp_path, *RUN, "--trainer.max_steps", step + 2, "--ckpt_path", "last")
    assert sorted(logged(tmp_path)) == list(range(step + 2))
    assert not partial_path(last).exists()


@pytest.mark.parametrize(
    ("number", "places"), [(signal.SIGTERM, []), *([] if DIVIDED else [(signal.SIGINT, TWO), (signal.SIGTERM, TWO)])]
)
def test_a_signal_waits_for_what_is_being_written_and_saves(number, places, model_folder, rows_file, tmp_path):
    process, output = started(model_folder, rows_file, tmp_path, *places, *OFTEN, *SLOW, 0.3, *ASIDE)
    os.kill(process.pid, number)
    process.join(60)
    said, code = output.read_text(), process.exitcode
    process.kill()
    assert code == 128 + number, said
    assert "Traceback" not in said
    assert state(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == max(logged(tmp_path)) + 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_error_of_the_training_does_not_cost_the_save_that_goes_on(model_folder, rows_file, tmp_path):
    failing = [*SLOW, 0.3, "--model.fails_at", 3]
    result = fit(model_folder, rows_file, tmp_path, *RUN, *OFTEN, *failing, *ASIDE, check=False, process=True)
    assert result.returncode == 1
    assert "the training fails" in result.stderr
    assert state(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert not list((tmp_path / "checkpoints").glob(".*"))


FULL = ["--model", "tests.support.helpers.OnAFullDisk"]
SHARDED = ["--trainer.strategy", "zero2", "--trainer.devices", 2]


@pytest.mark.parametrize("places", [[], TWO, SHARDED], ids=["one device", "ddp", "zero2"])
def test_a_full_disk_ends_the_run_at_a_later_step_in_its_line(places, model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *RUN, "--trainer.max_steps", 1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = {file.name: file.read_bytes() for file in last.iterdir()}
    own = [*RUN, *OFTEN, *FULL, *ASIDE, *places, "--trainer.max_steps", 2000, "--ckpt_path", last]
    result = fit(model_folder, rows_file, tmp_path, *own, check=False, process=True)
    line = next(line for line in result.stderr.splitlines() if "the checkpoint was not saved" in line)
    assert line.endswith(f"{last}: File too large; the checkpoint was not saved, earlier ones are untouched")
    assert "Traceback" not in result.stderr
    assert result.returncode
    assert 1 <= max(logged(tmp_path, version=1)) < 1000
    assert {file.name: file.read_bytes() for file in last.iterdir()} == before
    assert not list(last.parent.glob(".*"))


def test_what_is_not_portable_is_refused(model_folder, rows_file, tmp_path):
    own = [*RUN, *ASIDE, "--checkpoint.portable", "false"]
    line = one_line(fit(model_folder, rows_file, tmp_path, *own, check=False))
    assert line.startswith("checkpoint.asynchronous: only portable checkpoints are written beside the training; set ")
    for refused in (
        lambda: AtomicCheckpointIO(portable=False, asynchronous=True),
        lambda: LastCheckpoint(portable=False, asynchronous=True),
        lambda: AtomicCheckpointIO(portable=False).in_background(),
    ):
        with pytest.raises(FireflyError, match="only portable checkpoints"):
            refused()


TENSORS = [
    torch.arange(1000, dtype=torch.int64), torch.randn(7, 30, dtype=torch.bfloat16), torch.rand(9) < 0.5,
    torch.randn(20, 30).t(), torch.zeros(0, 3), torch.tensor(2.5), torch.randn(40, 40)[:, ::2],
]  # fmt: skip


def test_a_copy_has_the_bytes_that_a_tensor_had(monkeypatch):
    monkeypatch.setattr(host_copies, "CHUNK", 1000)
    copies = HostCopies()
    for _ in range(2):
        made = [tensor.clone() for tensor in TENSORS]
        taken = [copies.take(tensor) for tensor in made]
        copies.finish()
        for tensor in made:
            tensor.zero_()
        for tensor, parts in zip(TENSORS, taken, strict=True):
            expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert b"".join(part.tobytes() for part in parts) == expected
        copies.clear()
    used = sum(map(len, copies._chunks[False]))
    assert used < sum(tensor.nbytes for tensor in TENSORS) + 1000, "memory is used again"


def test_what_follows_a_save_waits_for_it_and_is_left_out_where_it_fails():
    saves, done = BackgroundSaves(), []
    saves.after(lambda: done.append("at once"))
    assert done == ["at once"]

    def slow():
        time.sleep(0.1)
        done.append("saved")

    saves.submit(slow)
    saves.after(lambda: done.append("removed"))
    assert done == ["at once"]
    saves.wait()
    assert done == ["at once", "saved", "removed"]

    def failing():
        time.sleep(0.1)
        raise FireflyError("full")

    saves.submit(failing)
    saves.after(lambda: done.append("not to be removed"))
    while not saves.failed:
        time.sleep(0.01)
    with pytest.raises(FireflyError, match="full"):
        saves.wait()
    assert not saves.failed
    saves.wait()
    assert len(done) == 3


def test_a_process_whose_peers_are_gone_does_not_wait_for_ever():
    saves = BackgroundSaves()
    saves.submit(lambda: saves.wait_for_others(lambda: False))
    told = []

    def together(act):
        told.append(act)
        act()
        raise FireflyError("another process could not")

    with pytest.raises(FireflyError, match="another process could not"):
        saves.settle(together)
    assert len(told) == 1, "its own part was done, and the wait for others was not begun"
    with pytest.raises(OthersAreGone):
        saves.wait()
