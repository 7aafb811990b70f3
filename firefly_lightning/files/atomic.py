"""Files and folders that appear whole or not at all, are gone at once, and never replace what they are made of.

A command writes to where nothing of value is (``new_file``, ``new_folder``): whatever number of processes do so, each
fills a hidden sibling of its own. A checkpoint takes the place of the one before it (``whole_file``, ``whole_folder``):
one process does so, and its hidden sibling has a name that others know, who help to fill it.
"""

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
        inputs: What it is made of.

    Raises:
        FireflyError: If ``out`` is taken or within an input, or the system refuses to read or write in the block.
    """
    check_new_folder(out, inputs)
    partial = _partial_of_this_process(out)
    with _one_line(out, partial), whole_folder(out, partial, durable=False, replacing=False):
        yield partial


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
        inputs: What it is made of.

    Raises:
        FireflyError: If ``out`` is a folder or an input, or the system refuses to read or write in the block.
    """
    check_new_file(out, inputs)
    partial = _partial_of_this_process(out)
    with _one_line(out, partial), whole_file(out, partial, durable=False, replacing=False) as file:
        yield file


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


@contextmanager
def whole_folder(
    target: Path, partial: Path | None = None, durable: bool = True, replacing: bool = True
) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``target`` when the block ends well, and else leaves no trace.

    Args:
        target: What it is called then. Missing parents are made.
        partial: What it is called until then; :func:`partial_path` by default, where a killed process's is removed.
        durable: Whether the new name survives a power failure; those who fill the folder see to what is in it.
        replacing: Whether a file or a filled folder may be at ``target``; what was there, or the new folder, can be
            found at every moment.
    """
    partial = _cleared(partial or partial_path(target))
    partial.mkdir()
    with _held(partial):
        yield partial
        _put(partial, target, durable, replacing)


@contextmanager
def whole_file(
    target: Path, partial: Path | None = None, durable: bool = True, replacing: bool = True
) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the place of ``target`` when the block ends well, or leaves no trace.

    Args:
        target: What it is called then. Missing parents are made.
        partial: What it is called until then; :func:`partial_path` by default, where a killed process's is removed.
        durable: Whether it survives a power failure, and with it its name.
        replacing: Whether a folder may be at ``target``; what was there, or the new file, can be found at every moment.
    """
    partial = _cleared(partial or partial_path(target))
    with partial.open("x+b") as file, _held(partial):
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        _put(partial, target, durable, replacing)


def remove_whole(path: Path) -> None:
    """Removes a file or a folder that may be read meanwhile: at no moment half of it has the name."""
    hidden = partial_path(path)
    remove(hidden)
    path.replace(hidden)
    remove(hidden)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    """Where what one process alone may write lies until it is complete."""
    # Neither a pattern for checkpoints nor one for visible files matches.
    return target.with_name(f".{target.name}.partial")


def replaced_path(target: Path) -> Path:
    """Where what another takes the place of lies until that has its name."""
    return target.with_name(f".{target.name}{_REPLACED}")


def replaced_paths(folder: Path, pattern: str) -> Iterator[Path]:
    """What is in a folder under names that match a pattern, hidden while another was to take its place.

    Where that has its name already, the hidden one is left out: it may be half removed.
    """
    for hidden in folder.glob(f".{pattern}{_REPLACED}"):
        if not hidden.with_name(hidden.name.removeprefix(".").removesuffix(_REPLACED)).exists():
            yield hidden


def sync(path: Path) -> None:
    """Makes what is in a file, or which names a folder holds, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_REPLACED = ".replaced"


def _put(partial: Path, target: Path, durable: bool, replacing: bool) -> None:
    """Gives what is complete its name.

    A folder cannot take another's place at once, nor a file's: for a moment the old one is hidden.
    """
    replaced = replaced_path(target)
    if replacing and (target.is_dir() or (partial.is_dir() and target.exists())):
        remove(replaced)
        target.rename(replaced)
    partial.replace(target)
    if durable:
        sync(target.parent)
    if replacing:
        remove(replaced)


@contextmanager
def _one_line(out: Path, partial: Path) -> Iterator[None]:
    """Says in one line what the system refuses while an output is made; before that, removes what killed ones left."""
    try:
        _remove_left_over(out)
        yield
    except FireflyError:  # which may be an OSError too
        raise
    except OSError as error:
        # A full disk names no file, and a file of the hidden folder would tell the user nothing.
        named = str(error.filename or "")
        where = named if named and partial.name not in named else out
        raise FireflyError(describe_os_error(error, where)) from error


def _cleared(partial: Path) -> Path:
    """A place to fill: its parents are made, and what a killed process has left there is removed."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    return partial


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


def _partial_of_this_process(out: Path) -> Path:
    return out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")


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
    """Removes what may be gone, or be filled meanwhile, as well as it can."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _tidy() -> None:
    for partial in list(_unfinished):
        _remove(partial)


before_end(_tidy)
