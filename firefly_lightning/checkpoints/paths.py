"""Files and folders of checkpoints: whole or absent, found, and read without running what they hold."""

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from firefly_lightning.errors import FireflyError, describe_os_error, reason

TRAINER_FILE = "trainer.ckpt"
"""In a checkpoint that is a folder: what Lightning saves, but for weights and optimizer states."""

WRITER_KEY = "written_by"
"""Where ``trainer.ckpt`` says which strategy wrote an engine's own folder, and on how many processes."""

MANIFEST = "checkpoint.json"
"""In a portable checkpoint: names, sizes and digests of its other files."""


def find_checkpoint(checkpoint: str) -> Path:
    """The checkpoint that a path means.

    A checkpoint is a file, or a folder, which a file inside it stands for too. A folder of checkpoints, and ``last``
    inside it, mean its latest ``last*.ckpt``, or where there is none its latest ``step=*.ckpt``.

    Raises:
        FireflyError: If there is none.
    """
    path = Path(checkpoint).expanduser()
    for place in (path, path.parent) if path.is_file() else (path,):
        if any((place / name).is_file() for name in (TRAINER_FILE, MANIFEST)):
            return place
    if path.is_file():
        return path
    folder = path.parent if path.name == "last" and not path.exists() else path
    if (replaced := _replaced(path)).exists():
        return replaced
    # A name may link to a checkpoint that a save has since removed.
    candidates = [file for file in folder.glob("last*.ckpt") if file.exists()]
    candidates += [hidden for hidden in folder.glob(".last*.ckpt.replaced") if not _replacing(hidden).exists()]
    candidates = candidates or list(folder.glob("step=*.ckpt"))
    found = sorted(candidates, key=lambda file: file.stat().st_mtime)
    if not found:
        problem = "holds no last.ckpt; name a checkpoint" if folder.is_dir() else "no such checkpoint; check the path"
        raise FireflyError(f"{checkpoint}: {problem}")
    return found[-1]


def load_file(path: Path, map_location: Any, weights_only: bool = True) -> dict[str, Any]:
    """What ``torch.save`` wrote.

    Raises:
        FireflyError: If there is no such file, it is no checkpoint, is damaged, or holds objects that could run code.
    """
    try:
        # Mapped, so that the processes of one machine share a single copy.
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # RuntimeError, EOFError, KeyError, UnpicklingError, … by where the damage is
        if isinstance(error, OSError) and error.filename:  # cannot be opened; a cut file fails in a nameless seek
            raise FireflyError(describe_os_error(error, path)) from error
        raise FireflyError(f"{path}: {_why_not_loaded(error)}") from error
    if not isinstance(checkpoint, dict):
        raise FireflyError(f"{path}: not a checkpoint; it holds a {type(checkpoint).__name__}")
    return checkpoint


def _why_not_loaded(error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return f"holds {refused[1]}, which could run code; load it with weights_only=False if you trust the file"
    return f"damaged, or not a checkpoint ({reason(error)}); use an earlier one"


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``target`` once it is complete and on the disk, and else leaves no trace."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(target: Path) -> Path:
    """Where ``target`` lies until it is complete."""
    # Neither a pattern for checkpoints nor one for visible files matches; a killed save's is overwritten by the next.
    return target.with_name(f".{target.name}.partial")


def partial_folder(target: Path) -> Path:
    """An empty folder beside ``target`` to fill; :func:`replace` then gives it that name."""
    partial = partial_path(target)
    remove(partial)
    partial.mkdir(parents=True)
    return partial


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the place of ``target`` once it is complete, and else leaves no trace."""
    partial = partial_folder(target)
    try:
        yield partial
        replace(partial, target)
    except BaseException:
        remove(partial)
        raise


def replace(partial: Path, target: Path) -> None:
    """Gives a complete file or folder its name; at every moment the old one or the new one can be found.

    A folder cannot take another's place at once, nor a file's: for a moment the old one is hidden, where
    ``find_checkpoint`` looks.
    """
    replaced = _replaced(target)
    if target.is_dir() or (partial.is_dir() and target.exists()):
        remove(replaced)
        target.rename(replaced)
    partial.replace(target)
    sync(target.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _replacing(replaced: Path) -> Path:
    """What takes the place of a hidden checkpoint; once it is there, the hidden one may be half removed."""
    return replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))


def sync(path: Path) -> None:
    """Makes what is in a file, or which names a folder holds, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
