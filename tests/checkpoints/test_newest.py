"""The newest whole checkpoint of a run, among all that killed saves, copies and other runs leave in its folder."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from firefly_lightning.checkpoints import start, torch_file
from firefly_lightning.checkpoints.newest import check_whole, newest_whole, slurm_checkpoint
from firefly_lightning.errors import FireflyError
from firefly_lightning.files import manifest
from tests.support.helpers import fit, raised_line

RUN = ["--data.batch_size", 8, "--data.micro_batch_size", 4, "--data.val_fraction", 0.25, "--model.warmup_steps", 1,
       "--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", 4,
       "--checkpoint.every_n_steps", 3]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder, rows_file) -> dict[str, Path]:
    """Checkpoints after 3, 4 and 6 steps, the last but one of them a best one, and those of a run that keeps one."""
    roots = {name: tmp_path_factory.mktemp("newest") / name for name in ("several", "one", "file")}
    options = {"several": ["--checkpoint.keep", 2], "one": [], "file": ["--checkpoint.portable", "false"]}
    for name, more in options.items():
        fit(model_folder, rows_file, roots[name], *RUN, *more, "--trainer.max_steps", 6)
    return {name: root / "checkpoints" for name, root in roots.items()}


@pytest.fixture
def several(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs["several"], tmp_path / "checkpoints", symlinks=True))


@pytest.fixture
def one(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs["one"], tmp_path / "checkpoints"))


def damage(path: Path) -> None:
    """Changes one byte of weights in a checkpoint."""
    file = path / "model-0-0.safetensors" if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)


def found(folder: Path):
    newest = newest_whole([folder, folder], folder.parent)
    return newest.path and newest.path.resolve().name, newest.step, [*newest.passed_over]


def test_what_the_runs_have_saved(runs):
    """So that the other tests are about what they say."""
    names = sorted(path.name for path in runs["several"].iterdir())
    assert [re.sub("-val.*", "", name) for name in names] == ["best-step=4", "last.ckpt", "step=3.ckpt", "step=6.ckpt"]
    assert (runs["several"] / "last.ckpt").is_symlink()
    assert sorted(path.name[:4] for path in runs["one"].iterdir()) == ["best", "last"]
    assert (runs["file"] / "last.ckpt").is_file()


@pytest.mark.parametrize("name", ["several", "one", "file"])
def test_the_newest_is_the_one_with_most_steps_whenever_files_were_changed(runs, name):
    target = "step=6.ckpt" if name == "several" else "last.ckpt"
    for path in runs[name].iterdir():
        if not path.is_symlink():
            os.utime(path, (1, 1) if path.name == target else None)
    assert found(runs[name]) == (target, 6, [])


def test_damaged_ones_are_passed_over_and_named(several):
    damage(several / "step=6.ckpt")
    name, step, (line,) = found(several)
    assert (name[:11], step) == ("best-step=4", 4)
    assert line.endswith("ckpt/model-0-0.safetensors: damaged, its contents have changed")
    damage(next(several.glob("best-*")))
    name, step, lines = found(several)
    assert (name, step, len(lines)) == ("step=3.ckpt", 3, 2)


def test_an_older_damaged_one_is_not_spoken_of(several):
    damage(several / "step=3.ckpt")
    (next(several.glob("best-*")) / "trainer.ckpt").unlink()
    assert found(several) == ("step=6.ckpt", 6, [])


@pytest.mark.parametrize("broken", ["trainer.ckpt", "checkpoint.json", "model.safetensors.index.json"])
def test_a_file_is_missing_or_cut(one, broken):
    file = one / "last.ckpt" / broken
    file.write_bytes(file.read_bytes()[:-20])
    name, step, (line,) = found(one)
    assert (name[:11], step) == ("best-step=4", 4)
    assert broken in line
    file.unlink()
    name, _, (line,) = found(one)
    assert name.startswith("best")
    assert "missing" in line or "no such file" in line.lower()


def test_contents_that_no_run_saves_are_damage_whatever_their_digest(one):
    last = one / "last.ckpt"
    trainer = torch.load(last / "trainer.ckpt", weights_only=True)
    torch.save({**trainer, "global_step": "6"}, last / "trainer.ckpt")
    entries = manifest.read_manifest(last / "checkpoint.json", "")
    files = {name: manifest.entry_of(last / name) for name in entries["files"]}
    manifest.write_manifest(last / "checkpoint.json", files, format=entries["format"])
    name, _, (line,) = found(one)
    assert name.startswith("best")
    assert "its global_step is str" in line


def test_what_killed_saves_have_left(several):
    """A hidden old one counts while there is no new one; an unfinished one never does, nor does a link to nothing."""
    shutil.move(several / "step=6.ckpt", several / ".step=6.ckpt.replaced")
    shutil.copytree(several / "step=3.ckpt", several / ".step=9.ckpt.partial")
    assert not (several / "last.ckpt").exists()
    assert found(several) == (".step=6.ckpt.replaced", 6, [])
    shutil.copytree(several / ".step=6.ckpt.replaced", several / "step=6.ckpt")
    assert found(several) == ("step=6.ckpt", 6, [])


def test_nothing_is_there(tmp_path):
    assert newest_whole([tmp_path / "none"], tmp_path) == (None, 0, [])
    (tmp_path / ".last.ckpt.partial").mkdir()
    assert newest_whole([tmp_path], tmp_path) == (None, 0, [])


def test_where_all_are_damaged_nothing_begins_anew(one):
    for path in one.iterdir():
        damage(path)
    with pytest.raises(FireflyError) as raised:
        newest_whole([one], one.parent)
    message = raised_line(raised)
    assert "damaged" in message
    assert message.endswith("no checkpoint of the run is whole (and 1 more are not): bring one back, or move them away "
                            "to begin anew")  # fmt: skip


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(one, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch_file, "version_of", closed)
    monkeypatch.setattr(manifest, "version_of", closed)
    with pytest.raises(FireflyError, match="Permission denied"):
        newest_whole([one], one.parent)


def test_of_several_runs_the_one_that_began_last_counts(model_folder, rows_file, runs, tmp_path):
    """It has made fewer steps, and copying has made the other's files newer."""
    shutil.copytree(runs["one"], tmp_path / "checkpoints")
    fit(model_folder, rows_file, tmp_path, *RUN, "--trainer.max_steps", 2)
    os.utime(tmp_path / "checkpoints" / "last.ckpt")
    assert found(tmp_path / "checkpoints") == ("last-v1.ckpt", 2, [])


def test_a_run_that_branched_off_counts(model_folder, rows_file, several):
    """Resumed on purpose from an earlier checkpoint, after which the other part has more steps."""
    fit(model_folder, rows_file, several.parent, *RUN, "--trainer.max_steps", 5, "--trainer.val_check_interval", 100,
        "--ckpt_path", several / "step=3.ckpt")  # fmt: skip
    assert found(several)[1] == 5


def test_checkpoints_of_slurm(one):
    root = one.parent
    assert slurm_checkpoint(root) is None
    for number in (2, 10):
        shutil.copytree(one / "last.ckpt", root / f"hpc_ckpt_{number}.ckpt")
    (root / "hpc_ckpt_x.ckpt").mkdir()
    assert slurm_checkpoint(root).name == "hpc_ckpt_10.ckpt"
    shutil.rmtree(root / "hpc_ckpt_x.ckpt")
    damage(one / "last.ckpt")
    name, step, _ = found(one)
    assert (name[:8], step) == ("hpc_ckpt", 6)


def test_auto_is_for_training(one):
    with pytest.raises(FireflyError) as raised:
        start.find_start("auto", "validate", {"last": one, "best": one}, one.parent, "min")
    assert raised_line(raised).startswith("ckpt_path auto is for fit")


def test_bytes_are_read_once_and_only_those_of_the_one_that_is_taken(several, monkeypatch):
    """What the search has digested is not digested again when the checkpoint is loaded."""
    read = []
    digest_of = manifest.digest_of
    monkeypatch.setattr(manifest, "digest_of", lambda path: (read.append(path), digest_of(path))[1])
    newest = newest_whole([several], several.parent)
    check_whole(newest.path)
    assert read
    assert len(read) == len(set(read))
    assert {path.parent for path in read} == {newest.path}


@pytest.mark.parametrize(("command", "words"), [("fit", "last, best or auto"), ("validate", "last or best")])
def test_a_mistyped_word_is_told_what_words_there_are(tmp_path: Path, command: str, words: str) -> None:
    folders = {"last": tmp_path, "best": tmp_path}
    with pytest.raises(FireflyError, match=f"^auot: no such checkpoint; ckpt_path takes {words}, or a path$"):
        start.find_start("auot", command, folders, tmp_path, "min")
