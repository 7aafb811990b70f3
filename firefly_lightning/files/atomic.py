"""Files and folders that appear whole or not at all, vanish at once, and never replace what they are made of.

A command writes to a place where nothing of value is (``new_file``, ``new_folder``): however many processes do so, each
fills a hidden sibling of its own. A checkpoint takes the place of the one before it (``whole_file``, ``whole_folder``):
one process puts it there, and its hidden sibling has a name known to the other processes, which help to fill it.
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
from firefly_lightning.files.modes import follow_umask
from firefly_lightning.interrupts import before_end

_unfinished: set[Path] = set()
"""The unfinished files and folders of this process, which lie beside its outputs until those are whole."""


@contextmanager
def new_folder(out: Path, inputs: Iterable[str | Path]) -> Iterator[Path]:
    """A folder to fill, which takes the name ``out`` only when the block ends well.

    Until then the folder is a hidden sibling of ``out``; whatever ends the block early removes it. Unfinished folders
    that killed processes have left of the same output are removed too.

    Args:
        out: The folder's name; nothing or an empty folder may be there. Missing parents are made.
        inputs: Files and folders that the new folder is made of.

    Raises:
        FireflyError: If ``out`` is taken or within an input, or the system refuses to read or write in the block.
    """
    check_new_folder(out, inputs)
    partial = _partial_of_this_process(out)
    with _one_line(out, partial), whole_folder(out, partial, durable=False, replacing=False):
        yield partial


def check_new_folder(out: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that a folder can be made at ``out`` without touching anything that is there already.

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
        out: Name of the finished file. Missing parents are made.
        inputs: Files and folders that the new file is made of.

    Raises:
        FireflyError: If ``out`` is a folder or an input, or the system refuses to read or write in the block.
    """
    check_new_file(out, inputs)
    partial = _partial_of_this_process(out)
    with _one_line(out, partial), whole_file(out, partial, durable=False, replacing=False) as file:
        yield file


def check_new_file(out: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that a file can be written at ``out`` without touching the inputs that it is made of.

    Raises:
        FireflyError: If ``out`` is a folder, an input, or within one.
    """
    check_output(out, inputs)
    if out.is_dir():
        raise FireflyError(f"{out}: is a folder; name a file")


def check_output(out: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that an output is no input and lies in none, under whatever name: links, hard links, ``..``.

    Args:
        out: The file or folder to be written.
        inputs: Files and folders; a name that is neither, such as a dataset of the hub, is passed over.

    Raises:
        FireflyError: If the output is an input or lies in one.
    """
    try:
        # A link is changed where it lies, what it leads to where that lies; `..` is no name in a folder.
        lies = [out, *(out.parent.resolve() / out.name).parents] if out.name != ".." else []
        places = dict.fromkeys([*lies, out.resolve(), *out.resolve().parents])
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
        target: Name of the finished folder. Missing parents are made.
        partial: Name of the folder until then, :func:`partial_path` by default; anything left there is removed first.
        durable: Whether the new name survives a power failure; the code that fills the folder sees to its files.
        replacing: Whether a file or a filled folder may be at ``target``; the old or the new one can be found at every
            moment.
    """
    partial = _cleared(partial or partial_path(target))
    partial.mkdir()
    with _held(partial):
        yield partial
        follow_umask(partial)
        _put(partial, target, durable, replacing)


@contextmanager
def whole_file(
    target: Path, partial: Path | None = None, durable: bool = True, replacing: bool = True
) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the place of ``target`` when the block ends well, or leaves no trace.

    Args:
        target: Name of the finished file. Missing parents are made.
        partial: Name of the file until then, :func:`partial_path` by default; anything left there is removed first.
        durable: Whether the file's content and its name survive a power failure.
        replacing: Whether a folder may be at ``target``; that folder or the new file can be found at every moment.
    """
    partial = _cleared(partial or partial_path(target))
    with partial.open("x+b") as file, _held(partial):
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        _put(partial, target, durable, replacing)


def remove_whole(path: Path) -> None:
    """Removes a file or a folder that may be read meanwhile: at no moment is half of it found under its name."""
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
    """Hidden place of a file or folder until it is complete, where a single process may write it."""
    # Neither a pattern for checkpoints nor one for visible files matches this name.
    return target.with_name(f".{target.name}.partial")


def replaced_path(target: Path) -> Path:
    """Hidden place of an old file or folder until the new one has its name."""
    return target.with_name(f".{target.name}{_REPLACED}")


def replaced_paths(folder: Path, pattern: str) -> Iterator[Path]:
    """Hidden old files and folders (:func:`replaced_path`) in a folder, whose own names match a pattern.

    Where a new one has the name already, the hidden old one is left out: it may be half removed.
    """
    for hidden in folder.glob(f".{pattern}{_REPLACED}"):
        if not hidden.with_name(hidden.name.removeprefix(".").removesuffix(_REPLACED)).exists():
            yield hidden


def sync(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_REPLACED = ".replaced"


def _put(partial: Path, target: Path, durable: bool, replacing: bool) -> None:
    """Gives a complete file or folder its name.

    A folder cannot take the place of a file or of a filled folder in one step: for a moment the old one is hidden.
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
    """Turns a refusal of the system while an output is made into one line; first removes what killed processes left."""
    try:
        _remove_left_over(out)
        yield
    except FireflyError:  # a FireflyError may be an OSError too
        raise
    except OSError as error:
        # A full disk names no file, and a file of the hidden folder would tell the user nothing.
        named = str(error.filename or "")
        where = named if named and partial.name not in named else out
        raise FireflyError(describe_os_error(error, where)) from error


def _cleared(partial: Path) -> Path:
    """Clears a place to fill: makes its parents, and removes what a killed process has left there."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    return partial


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Locks an unfinished file or folder, so that it is not taken for a dead process's, and removes it at the end.

    The lock is ``flock``'s, which belongs to the open file: closing another descriptor of that file does not end it.
    """
    _unfinished.add(partial)
    lock = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where nothing of other processes is removed either
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        _remove(partial)
        _unfinished.discard(partial)
        os.close(lock)


def _partial_of_this_process(out: Path) -> Path:
    return out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")


def _remove_left_over(out: Path) -> None:
    """Removes what killed processes have left beside an output, and spares what living ones fill and have locked."""
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
    """Removes as much as it can of a file or folder that may be gone already, or may be filled meanwhile."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _tidy() -> None:
    for partial in list(_unfinished):
        _remove(partial)


before_end(_tidy)
