"""Reads a file that ``torch.save`` wrote, without running code that the file holds."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from firefly_lightning.errors import FireflyError, reason, unreadable


def load_file(path: Path, map_location: Any, weights_only: bool = True) -> dict[str, Any]:
    """Loads the dictionary that ``torch.save`` wrote into a file.

    Args:
        path: The file.
        map_location: Where the tensors go; see ``torch.load``.
        weights_only: Whether a file with objects that could run code is refused.

    Raises:
        MissingFileError: If there is no such file.
        FireflyError: If the file is no checkpoint, is damaged, or holds objects that could run code.
    """
    try:
        # The file is mapped into memory, so that the processes of one machine share a single copy.
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # RuntimeError, EOFError, KeyError, UnpicklingError, … by where the damage is
        if isinstance(error, OSError) and error.filename:  # cannot be opened; a cut file fails in a nameless seek
            raise unreadable(error, path) from error
        raise FireflyError(f"{path}: {_why_not_loaded(error)}") from error
    if not isinstance(checkpoint, dict):
        raise FireflyError(f"{path}: not a checkpoint; it holds a {type(checkpoint).__name__}")
    return checkpoint


def _why_not_loaded(error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return f"holds {refused[1]}, which could run code; load it with weights_only=False if you trust the file"
    return f"damaged, or not a checkpoint ({reason(error)}); use an earlier one"
