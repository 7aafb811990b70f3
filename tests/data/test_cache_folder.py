"""Folders of the token cache: damage is made anew and said, and processes that wait say for whom."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from filelock import FileLock

from firefly_lightning.data import cache_folder, token_cache
from firefly_lightning.data.cache_folder import ensure_folder
from firefly_lightning.data.token_cache import tokenize
from firefly_lightning.data.tokenized_rows import TokenizedRows
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.prompt import PRESETS, PromptEncoder
from tests.support.helpers import fit, logged, one_line, raised_line


@pytest.fixture(scope="module")
def encoder(model_folder):
    return PromptEncoder(load_tokenizer(str(model_folder)), PRESETS["firefly"])


@pytest.fixture(scope="module")
def made(encoder, rows_file, tmp_path_factory) -> Path:
    return tokenize(str(rows_file), encoder, 512, "truncate", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "cache" / made.name)


def again(folder: Path, encoder, rows_file) -> Path:
    return tokenize(str(rows_file), encoder, 512, "truncate", folder.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_whole_folder_is_read_and_nothing_is_written(folder, encoder, rows_file, capfd, monkeypatch):
    """Also where nothing may be written, and while another process holds the lock."""
    before = sorted(folder.parent.rglob("*"))
    monkeypatch.setattr(cache_folder, "FileLock", lambda path: pytest.fail("locked"))
    monkeypatch.setattr(token_cache, "_write", lambda *args: pytest.fail("tokenised again"))
    assert again(folder, encoder, rows_file) == folder
    assert sorted(folder.parent.rglob("*")) == before
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", ["rows.arrow", "report.json", "digests.json"])
def test_damage_to_any_file_is_made_anew_and_said(folder, made, encoder, rows_file, name, capfd):
    file, whole = folder / name, (made / name).read_bytes()
    places = {*range(0, len(whole), len(whole) // 8 + 1), len(whole) - 1}
    damaged = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in sorted(places)]
    for content in (*damaged, whole[:-1], whole[: len(whole) // 2], b"", bytes(len(whole)), b"[]", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        assert again(folder, encoder, rows_file) == folder
        assert contents(folder) == contents(made)
        said = capfd.readouterr().err
        assert re.fullmatch(rf"note: {re.escape(str(file))}: .*; it is made anew\n", said), content
    assert {path.suffix for path in folder.parent.iterdir() if path != folder} == {".lock"}


def test_a_folder_that_is_empty_or_a_file_is_made_anew(folder, made, encoder, rows_file):
    for spoil in (folder.mkdir, folder.touch):
        shutil.rmtree(folder)
        spoil()
        assert contents(again(folder, encoder, rows_file)) == contents(made)


def test_a_flipped_byte_does_not_change_a_run(model_folder, rows_file, tmp_path, capfd):
    run = [*("--data.batch_size", 8), *("--trainer.max_steps", 2), "--data.cache_dir"]
    fit(model_folder, rows_file, tmp_path / "a", *run, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/rows.arrow")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 3] ^= 4
    file.write_bytes(whole)
    result = fit(model_folder, rows_file, tmp_path / "b", *run, tmp_path / "cache")
    assert f"note: {file}: damaged, its contents have changed; it is made anew" in result.stderr
    assert logged(tmp_path / "b") == logged(tmp_path / "a")


@pytest.mark.parametrize("moment", ["before the first row", "after the last row"])
def test_a_source_that_changes_while_it_is_read_leaves_nothing(encoder, rows_file, tmp_path, monkeypatch, moment):
    """Also one that is then changed back, with its old times: its other content would stay in the cache."""
    source, right = tmp_path / "rows.jsonl", rows_file.read_text("utf-8")
    source.write_text(right, "utf-8")
    times = source.stat()
    write = token_cache._write

    def changing(path, *args):
        source.write_text(right.replace("Summary", "POISON!"), "utf-8")
        report = write(path, *args)
        if moment == "before the first row":
            source.write_text(right, "utf-8")
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
        return report

    monkeypatch.setattr(token_cache, "_write", changing)
    with pytest.raises(FireflyError, match="was changed while it was read; start again when nothing writes") as raised:
        tokenize(str(source), encoder, 512, "truncate", tmp_path / "cache")
    assert raised_line(raised).startswith(f"{source}: ")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    monkeypatch.undo()
    source.write_text(right, "utf-8")
    folder = tokenize(str(source), encoder, 512, "truncate", tmp_path / "cache")
    assert TokenizedRows([folder], ["x"]).kinds == ["SentimentAnalyze", "Summary"]


def refuse(error: int):
    def filled(partial):
        raise OSError(error, "")

    return filled


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (28, "No space left on device; free some space, or set data.cache_dir to another folder"),
        (30, "Read-only file system; set data.cache_dir to another folder"),
    ],
)
def test_a_disk_that_takes_nothing_is_said_and_nothing_stays(tmp_path, number, message):
    with pytest.raises(FireflyError) as raised:
        ensure_folder(tmp_path / "cache" / "key", refuse(number), "rows")
    assert raised_line(raised) == f"{tmp_path / 'cache'}: {message}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key.lock"]


def test_a_full_disk_ends_a_run_in_a_line(model_folder, rows_file, tmp_path, monkeypatch):
    os_file = pyarrow.OSFile
    monkeypatch.setattr("pyarrow.OSFile", lambda path, mode: os_file("/dev/full", mode))
    result = fit(model_folder, rows_file, tmp_path / "a", "--data.cache_dir", tmp_path / "cache", check=False)
    cure = "free some space, or set data.cache_dir to another folder"
    assert one_line(result) == f"{tmp_path / 'cache'}: No space left on device; {cure}"


def test_a_folder_or_file_in_the_way_is_named(tmp_path):
    (tmp_path / "key.lock").mkdir()
    with pytest.raises(FireflyError) as raised:
        ensure_folder(tmp_path / "key", lambda partial: None, "rows")
    assert raised_line(raised) == f"{tmp_path / 'key.lock'}: is a folder in the place of a lock; remove it"
    (tmp_path / "cache").touch()
    with pytest.raises(FireflyError) as raised:
        ensure_folder(tmp_path / "cache" / "key", lambda partial: None, "rows")
    assert raised_line(raised) == f"{tmp_path / 'cache'}: File exists; set data.cache_dir to another folder"


HOLDS = """
import sys, time
from pathlib import Path
from firefly_lightning.data.cache_folder import ensure_folder
ensure_folder(Path(sys.argv[1]), lambda partial: time.sleep(600), "rows")
"""


def test_who_waits_says_for_which_process(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cache_folder, "_WAITS", (0.3, 0.3))
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "key")])
    while not (tmp_path / "key.lock").exists() or not (tmp_path / "key.lock").read_text():
        time.sleep(0.05)
    os.kill(holder.pid, signal.SIGSTOP)
    said = []

    def say(line):
        said.append(line)
        if len(said) == 2:
            holder.kill()

    monkeypatch.setattr(cache_folder, "_say", say)

    def fill(partial):
        for name in ("rows.arrow", "report.json"):
            (partial / name).touch()

    ensure_folder(tmp_path / "key", fill, "the token ids of rows.jsonl")
    holder.wait()
    cure = f"kill -CONT {holder.pid} lets it go on, kill -9 {holder.pid} ends it"
    stopped = f"process {holder.pid}, which is stopped ({cure})"
    assert set(said) == {f"waiting for {stopped}, to make the token ids of rows.jsonl"}
    assert (tmp_path / "key.lock").read_text().startswith(f"{os.getpid()} ")
    assert cache_folder._holder(tmp_path / "key.lock") == f"process {os.getpid()}"
    (tmp_path / "key.lock").write_text("7 elsewhere")
    assert cache_folder._holder(tmp_path / "key.lock") == "process 7 of elsewhere"
    for nothing in ("", "x y"):
        (tmp_path / "key.lock").write_text(nothing)
        assert cache_folder._holder(tmp_path / "key.lock") == "another process"
    with FileLock(tmp_path / "key.lock"):
        ensure_folder(tmp_path / "key", fill, "not needed")
