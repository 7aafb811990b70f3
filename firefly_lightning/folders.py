"""Output files and folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from firefly_lightning.errors import FireflyError, describe_os_error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``out`` only when the block ends well.

    Until then it lies in a hidden sibling of ``out``; whatever ends the block early removes it.

    Args:
        out: Must not exist, or be an empty folder. Missing parents are made.

    Raises:
        FireflyError: If ``out`` is taken, or the system refuses to read or write in the block.
    """
    check_new_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            # One level deeper, because the scratch folder itself is readable by its owner only.
            folder = Path(scratch) / out.name
            folder.mkdir()
            yield folder
            folder.replace(out)
    except OSError as error:
        # A full disk names no file, and a file of the scratch folder would tell the user nothing.
        named = str(error.filename or "")
        where = named if named and f".{out.name}." not in named else out
        raise FireflyError(describe_os_error(error, where)) from error


def check_new_folder(out: Path) -> None:
    """Checks that a folder can be made at ``out`` without touching what is there.

    Raises:
        FireflyError: If ``out`` is a file or a folder with something in it.
    """
    if out.is_dir() and any(out.iterdir()):
        raise FireflyError(f"{out}: is not empty; choose another folder, or remove it first")
    if out.exists() and not out.is_dir():
        raise FireflyError(f"{out}: is a file; choose another name for the folder")


@contextmanager
def new_file(out: Path) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the place of ``out`` only when the block ends well.

    Raises:
        FireflyError: If ``out`` is a folder, or the system refuses to read or write in the block.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.is_dir():
            raise FireflyError(f"{out}: is a folder; name a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w+b") as file:
            yield file
        partial.replace(out)
    except OSError as error:
        raise FireflyError(describe_os_error(error, out)) from error
    finally:
        with suppress(OSError):
            partial.unlink()
