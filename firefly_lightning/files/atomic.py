"""Output files and folders that appear whole or not at all, and never in place of what they are made of."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.interrupts import before_end

_unfinished: set[Path] = set()
"""What lies beside outputs of this process until they are whole."""


@contextmanager
def new_folder(out: Path, inputs: Iterable[str | Path]) -> Iterator[Path]:
    """A folder to fill, which takes the name ``out`` only when the block ends well.

    Until then it is a hidden sibling of ``out``; whatever ends the block early removes it, and what a killed process
    has left there of the same output is removed too.

    Args:
        out: Must not exist, or be an empty folder. Missing parents are made.
        inputs: Of which it is made.

    Raises:
        FireflyError: If ``out`` is taken or within an input, or the system refuses to read or write in the block.
    """
    check_new_folder(out, inputs)
    partial = _partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(out)
        partial.mkdir()
        with _held(partial):
            yield partial
            partial.replace(out)
    except OSError as error:
        # A full disk names no file, and a file of the hidden folder would tell the user nothing.
        named = str(error.filename or "")
        where = named if named and partial.name not in named else out
        raise FireflyError(describe_os_error(error, where)) from error


def check_new_folder(out: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that a folder can be made at ``out`` without touching what is there.

    Raises:
        FireflyError: If ``out`` is a file, a folder with something in it, or within an input.
    """
    check_output(out, inputs)
    if out.is_dir() and any(out.iterdir()):
        raise FireflyError(f"{out}: is not empty; choose another folder, or remove it first")
    if out.exists() and not out.is_dir():
        raise FireflyError(f"{out}: is a file; choose another name for the folder")


@contextmanager
def new_file(out: Path, inputs: Iterable[str | Path]) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the place of ``out`` only when the block ends well.

    Args:
        out: What it is called then. Missing parents are made.
        inputs: Of which it is made.

    Raises:
        FireflyError: If ``out`` is a folder or an input, or the system refuses to read or write in the block.
    """
    check_new_file(out, inputs)
    partial = _partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(out)
        with partial.open("x+b") as file, _held(partial):
            yield file
            file.flush()
            partial.replace(out)
    except OSError as error:
        raise FireflyError(describe_os_error(error, out)) from error


def check_new_file(out: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that a file can be written at ``out`` without touching what it is made of.

    Raises:
        FireflyError: If ``out`` is a folder, an input, or within one.
    """
    check_output(out, inputs)
    if out.is_dir():
        raise FireflyError(f"{out}: is a folder; name a file")


def check_output(out: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that an output is none of the inputs and lies in none, under whatever name: links, hard links, ``..``.

    Args:
        out: What is to be written.
        inputs: Files and folders; what is neither, such as a dataset of the hub, is passed over.

    Raises:
        FireflyError: If it is, or does.
    """
    try:
        # Both ways up: a link may lead out of an input, or into it.
        places = dict.fromkeys([out, *out.absolute().parents, out.resolve(), *out.resolve().parents])
        there = [place for place in places if place.exists()]
        for path in {str(given): Path(given).expanduser() for given in inputs}.values():
            for place in there if path.exists() else ():
                if place.samefile(path):
                    is_it = place in (out, out.resolve())
                    found = "is also an input" if is_it else f"lies in {path}, which is an input"
                    raise FireflyError(f"{out}: {found}; write to another place")
    except OSError as error:
        raise FireflyError(describe_os_error(error, out)) from error


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Locks what is being filled, so that others can tell it from what a dead process left, and removes it at the end.

    The lock is one of ``flock``, which belongs to the open file: closing another of the same name does not end it.
    """
    _unfinished.add(partial)
    lock = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where nothing of others is removed either
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        _remove(partial)
        _unfinished.discard(partial)
        os.close(lock)


def _remove_left_over(out: Path) -> None:
    """Removes what killed processes have left beside an output; what a living one fills is locked."""
    for partial in out.parent.glob(f".{_escaped(out.name)}.{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError):
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(partial)
            finally:
                os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _tidy() -> None:
    for partial in list(_unfinished):
        _remove(partial)


before_end(_tidy)
