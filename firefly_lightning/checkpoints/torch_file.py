"""Files of ``torch.save``: written with a digest at their end, and read without running code that they hold.

Such a file is a zip archive, which may end in a comment that readers of archives pass over; ours is the digest.
"""

import pickle
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from firefly_lightning.checkpoints.contents import DAMAGED
from firefly_lightning.checkpoints.layout import TRAINER_FILE
from firefly_lightning.checkpoints.shared_checks import once_a_machine
from firefly_lightning.errors import FireflyError, reason, unreadable
from firefly_lightning.files.versions import Version, version_of

_END, _END_SIZE = b"PK\x05\x06", 22
"""How the last record of an archive begins, and its bytes without the comment, whose length is the last two of them."""

_LABEL = b"xxh3_128:"
_COMMENT_SIZE = len(_LABEL) + 32
_BLOCK = 2**20

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file begins that PyTorch before 1.6 wrote, which is no archive."""


def save_file(contents: dict[str, Any], file: BinaryIO) -> None:
    """Writes what ``torch.save`` writes, with a digest of all bytes at its end.

    Args:
        contents: What to save.
        file: An empty file, open to write and to read.
    """
    torch.save(contents, file)
    size = file.seek(0, 2)
    file.seek(size - 2)
    file.write(struct.pack("<H", _COMMENT_SIZE))
    comment = _comment(file, size)
    file.seek(size)
    file.write(comment)


def trainer_file(checkpoint: Path) -> Path:
    """The file of a checkpoint that holds what Lightning saved: one in its folder, or the checkpoint itself."""
    return checkpoint / TRAINER_FILE if checkpoint.is_dir() else checkpoint


def load_file(path: Path, map_location: Any, weights_only: bool = True, digested: bool = True) -> dict[str, Any]:
    """Loads the dictionary that ``torch.save`` wrote into a file.

    Args:
        path: The file.
        map_location: Where the tensors go; see ``torch.load``.
        weights_only: Whether a file with objects that could run code is refused.
        digested: Whether the whole file is read to compare its digest; if not, little more than its plain values is.

    Raises:
        MissingFileError: If there is no such file.
        FireflyError: If the file is no checkpoint, is damaged, or holds objects that could run code.
    """
    try:
        if digested:
            once_a_machine(lambda file: _check_digest(file, version_of(file)), [path])
        # The file is mapped into memory, so that the processes of one machine share a single copy.
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
    except (torch.OutOfMemoryError, FireflyError):
        raise
    except Exception as error:  # RuntimeError, EOFError, KeyError, UnpicklingError, … by where the damage is
        if isinstance(error, OSError) and error.filename:  # cannot be opened; a cut file fails in a nameless seek
            raise unreadable(error, path) from error
        raise FireflyError(f"{path}: {_why_not_loaded(path, error)}") from error
    if not isinstance(checkpoint, dict):
        raise FireflyError(f"{path}: not a checkpoint; it holds a {type(checkpoint).__name__}")
    return checkpoint


def is_legacy(path: Path) -> bool:
    """Whether PyTorch before 1.6 wrote a file, which then can only be read as a whole."""
    with path.open("rb") as file:
        return file.read(len(LEGACY)) == LEGACY


def how_to_save_anew(path: Path) -> str:
    """What a file of PyTorch before 1.6 is, and what to do about it, in words."""
    saving = "torch.save(torch.load(file, 'cpu', weights_only=True), file + '.new')"
    code = f"import os, torch; file = {str(path)!r}; {saving}; os.replace(file + '.new', file)"
    return f'is of PyTorch before 1.6, which cannot be read in parts; save it anew: python -c "{code}"'


@lru_cache
def _check_digest(path: Path, version: Version) -> None:
    """Checks the digest at the end of an archive; one of an older release, or of another program, has none.

    A file is read as a whole for it, so the same version of a file only once a process: a start reads the prompt
    format, the configuration and the weights of a checkpoint.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _BLOCK))
        tail = file.read()
        at = tail.rfind(_END)
        end = tail[at : at + _END_SIZE] if at >= 0 else b""
        if len(end) < _END_SIZE:
            return  # no archive that PyTorch can read
        comment = tail[at + _END_SIZE :]
        if struct.unpack("<H", end[-2:])[0] != len(comment):
            raise FireflyError(f"{path}: damaged, its end is not whole; {DAMAGED}")
        if len(comment) == _COMMENT_SIZE and comment != _comment(file, size - len(comment)):
            raise FireflyError(f"{path}: damaged, its contents have changed; {DAMAGED}")


def _comment(file: BinaryIO, size: int) -> bytes:
    """The comment that belongs to the first ``size`` bytes of an archive."""
    digest = xxhash.xxh3_128()
    file.seek(0)
    while block := file.read(min(_BLOCK, size - file.tell())):
        digest.update(block)
    return _LABEL + digest.hexdigest().encode()


def _why_not_loaded(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return f"holds {refused[1]}, which could run code; load it with weights_only=False if you trust the file"
    if is_legacy(path):
        return how_to_save_anew(path)
    return f"damaged, or not a checkpoint ({reason(error)}); use an earlier one"
