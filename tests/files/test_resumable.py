"""Files that are written in pieces: whole or absent, gone on with after a kill, never two at once."""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.resumable import ResumableFile
from firefly_lightning.preparation import build as build_module
from firefly_lightning.preparation.build import build
from firefly_lightning.processes import map_in_order
from tests.support.helpers import forked, raised_line, wait_for_ends


class KilledError(BaseException):
    """Stands for what no handler sees: nothing after it is cleaned up."""


def write(target, pieces, identity="x", killed_after=None):
    """Writes pieces from where the file stands; returns how many it found there."""
    with ResumableFile(target, identity) as file:
        found = file.state or 0
        for number, piece in enumerate(pieces[found:], found + 1):
            if killed_after == number - 1:
                raise KilledError
            file.append(piece, number)
    return found


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.data())
def test_pieces_are_gone_on_with_wherever_a_kill_fell(tmp_path_factory, pieces, data):
    target = tmp_path_factory.mktemp("resume") / "out"
    killed_after = data.draw(st.integers(0, len(pieces) - 1))
    with pytest.raises(KilledError):
        write(target, pieces, killed_after=killed_after)
    assert not target.exists()
    # What a kill in the middle of a write, or of a line of the journal, leaves.
    with (target.parent / ".out.partial").open("ab") as file:
        file.write(data.draw(st.binary(max_size=9)))
    with (target.parent / ".out.journal").open("ab") as file:
        file.write(data.draw(st.sampled_from([b"", b"{", b'{"end": 3, "digest"'])))
    assert write(target, pieces) == killed_after
    assert target.read_bytes() == b"".join(pieces)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_another_identity_or_damaged_bytes_begin_anew(tmp_path):
    for damage, identity in ((None, "y"), (b"X", "x")):
        with pytest.raises(KilledError):
            write(tmp_path / "out", [b"ab", b"cd", b"ef"], killed_after=2)
        partial = tmp_path / ".out.partial"
        assert partial.read_bytes() == b"abcd"
        if damage:
            partial.write_bytes(damage + partial.read_bytes()[1:])
        assert write(tmp_path / "out", [b"ab", b"cd", b"ef"], identity) == 0
        assert (tmp_path / "out").read_bytes() == b"abcdef"
        (tmp_path / "out").unlink()


def test_a_mistake_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(ZeroDivisionError), ResumableFile(tmp_path / "out", "x") as file:
        file.append(b"new", 1 / 0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "old"}


def write_until_told(target: Path, connection: Connection) -> None:
    with ResumableFile(target, "x") as file:
        file.append(b"a", 1)
        connection.send("writing")
        connection.recv()


def test_two_processes_do_not_write_one_file(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    other = forked(write_until_told, tmp_path / "out", theirs)
    assert ours.recv() == "writing"
    with pytest.raises(FireflyError, match="another process is writing it") as raised:
        write(tmp_path / "out", [b"b"])
    raised_line(raised)
    ours.send("end")
    other.join()
    assert (tmp_path / "out").read_bytes() == b"a"


ROWS = [{"first": f"春风{number}度", "second": f"秋月{number}圆"} for number in range(20_000)]


def build_slowly(source: Path, out: Path, workers: int) -> None:
    with mock.patch.object(build_module, "ROWS_PER_CHUNK", 20):
        build("Couplet", [str(source)], str(out), workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path, workers, capsys, monkeypatch):
    source, out = tmp_path / "raw.jsonl", tmp_path / "killed" / "out.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    journal = out.parent / ".out.jsonl.journal"
    building = forked(build_slowly, source, out, workers)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 10):
        assert building.is_alive(), "it ended before it could be killed"
        time.sleep(0.001)
    building.kill()
    building.join()
    assert not out.exists()
    read = json.loads(journal.read_bytes().split(b"\n")[-2])["state"][0]
    assert 0 < read < len(ROWS)
    build("Couplet", [str(source)], str(out), workers=workers)
    assert f"going on after {read} raw rows" in capsys.readouterr().out
    build("Couplet", [str(source)], str(tmp_path / "whole.jsonl"), workers=1)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def double(number: int) -> int:
    if number == 77:
        raise FireflyError("77 is too much")
    time.sleep(0.002 * (number % 3))
    return 2 * number


def test_processes_keep_the_order_and_take_little_ahead():
    taken = []

    def items():
        for number in range(60):
            taken.append(number)
            yield number

    for at, result in enumerate(map_in_order(double, items(), workers=2)):
        assert result == 2 * at
        assert len(taken) <= at + 6
    assert list(map_in_order(double, range(60), workers=1)) == [2 * number for number in range(60)]
    with pytest.raises(FireflyError, match="77 is too much"):
        list(map_in_order(double, range(200), workers=2))
    assert not multiprocessing.active_children()


def end_oneself(number: int) -> int:
    if number == 77:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [78, 500])
def test_a_killed_worker_is_told_in_a_line(count):
    with pytest.raises(FireflyError, match=r"^a worker process was killed, perhaps for want of memory; give the same"):
        list(map_in_order(end_oneself, range(count), workers=2))
    assert not multiprocessing.active_children()


def name_oneself(seconds: float) -> None:
    os.write(1, b"%d\n" % os.getpid())  # a line at once, so that those of two processes do not mix
    time.sleep(seconds)


def have_work_done(output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
    list(map_in_order(name_oneself, [0.1, 600, 600, 600], 2))


def test_workers_end_with_a_killed_parent(tmp_path):
    output = tmp_path / "output"
    parent = forked(have_work_done, output)
    while not (output.exists() and len(lines := output.read_text().splitlines()) >= 3):
        assert parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    parent.join()
    wait_for_ends(set(map(int, lines)))
