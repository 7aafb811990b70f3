"""Files and folders that take the place of others: at every moment one of both is whole, and nothing else is left."""

import os
import signal
from pathlib import Path

import pytest

from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import new_file, new_folder, partial_path, remove_whole, whole_file, whole_folder

PARTS = ("trainer.ckpt", "more")


def make(path: Path, kind: str, text: str) -> None:
    """A checkpoint by plain means; a link leads to another one."""
    if kind == "file":
        path.write_text(text, "ascii")
    elif kind == "folder":
        path.mkdir()
        for name in PARTS:
            (path / name).write_text(text, "ascii")
    elif kind == "link":
        make(path.with_name("step=1.ckpt"), "folder", text)
        path.symlink_to("step=1.ckpt")


def save(path: Path, kind: str, text: str) -> None:
    if kind == "file":
        with whole_file(path) as file:
            file.write(text.encode("ascii"))
        return
    with whole_folder(path) as folder:
        assert folder == partial_path(path), "others fill it too"
        for name in PARTS:
            (folder / name).write_text(text, "ascii")


def held(path: Path) -> str:
    """What a checkpoint holds, all of it the same."""
    (text,) = {file.read_text("ascii") for file in (path.iterdir() if path.is_dir() else [path])}
    assert path.is_file() or sorted(file.name for file in path.iterdir()) == sorted(PARTS)
    return text


def killed_before(call: int, act) -> bool:
    """Acts in another process that is killed before it changes a name for the so many-th time; whether it was."""
    if not (child := os.fork()):
        left = call

        def counted(change):
            def changing(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kwargs)

            return changing

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["nothing", "file", "folder", "link"])
def test_whenever_a_save_is_killed_the_old_or_the_new_checkpoint_is_found(old, new, tmp_path):
    for call in range(100):
        folder = tmp_path / str(call)
        folder.mkdir()
        last = folder / "last.ckpt"
        make(last, old, "old")
        killed = killed_before(call, lambda last=last: save(last, new, "new"))
        if killed and old == "nothing" and not last.exists():
            continue
        for named in (folder, folder / "last", last):
            assert held(find_checkpoint(str(named))) in ("old", "new"), call
        if killed:
            save(last, new, "next")
        else:
            assert held(last) == "new"
        assert {path.name for path in folder.iterdir()} - {"step=1.ckpt"} == {"last.ckpt"}, "a killed save's is gone"
        if not killed:
            break
    assert 0 < call < 20


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_that_is_being_removed_is_whole_or_gone(kind, tmp_path):
    for call in range(20):
        path = tmp_path / str(call) / "step=1.ckpt"
        path.parent.mkdir()
        make(path, kind, "old")
        killed = killed_before(call, lambda path=path: remove_whole(path))
        assert not path.exists() or held(path) == "old"
        if not killed:
            break
    assert list(path.parent.iterdir()) == []
    assert call > 0


@pytest.mark.parametrize("left", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_what_a_killed_save_has_left_may_be_of_the_other_kind(left, new, tmp_path):
    make(partial_path(tmp_path / "last.ckpt"), left, "half")
    save(tmp_path / "last.ckpt", new, "new")
    assert held(tmp_path / "last.ckpt") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_checkpoints_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    kinds = {True: "folder", False: "file"}

    def noted(descriptor):
        done.append(kinds[Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    save(tmp_path / "last.ckpt", "file", "new")
    assert done == ["file", "name", "folder"]
    with new_file(tmp_path / "out", []) as file:
        file.write(b"x")
    assert done[3:] == ["name"], "what a command can make again does not wait for the disk"


def test_commands_do_not_replace_what_has_come_into_being_meanwhile(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FireflyError, match="out: Directory not empty"), new_folder(out, []):
        make(out, "folder", "of another")
    assert held(out) == "of another"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_error_names_the_file_that_could_not_be_read(tmp_path):
    with pytest.raises(FireflyError, match=r"none: No such file"), new_file(tmp_path / "out", []):
        (tmp_path / "none").read_bytes()
    assert list(tmp_path.iterdir()) == []
