"""Finds the checkpoint that a path means."""

import math
import re
from pathlib import Path

from firefly_lightning.checkpoints.layout import MANIFEST, TRAINER_FILE
from firefly_lightning.errors import MissingFileError
from firefly_lightning.files.atomic import replaced_path, replaced_paths


def find_checkpoint(checkpoint: str, mode: str = "min") -> Path:
    """The checkpoint that a path means.

    A checkpoint is a file or a folder; a path to a file inside such a folder means the folder too. A folder of several
    checkpoints, and the name ``last`` inside it, mean its latest ``last*.ckpt``, or its latest ``step=*.ckpt`` where it
    has no ``last*.ckpt``. The name ``best`` inside it means the one of ``best-*.ckpt`` whose name has the best value.
    The folder of a run means its ``checkpoints``.

    Args:
        checkpoint: The path.
        mode: Whether the lowest (``min``) or the highest (``max``) value is best.

    Raises:
        MissingFileError: If the path means no checkpoint.
    """
    path = Path(checkpoint).expanduser()
    for place in (path, path.parent) if path.is_file() else (path,):
        if any((place / name).is_file() for name in (TRAINER_FILE, MANIFEST)):
            return place
    if path.is_file():
        return path
    if path.name == "best" and not path.exists():
        return _best(path.parent, mode)
    folder = path.parent if path.name == "last" and not path.exists() else path
    if (replaced := replaced_path(path)).exists():
        return replaced
    # A name may link to a checkpoint that a save has since removed.
    candidates = [file for file in folder.glob("last*.ckpt") if file.exists()]
    candidates += replaced_paths(folder, "last*.ckpt")
    candidates = candidates or list(folder.glob("step=*.ckpt"))
    found = sorted(candidates, key=lambda file: file.stat().st_mtime)
    if not found and (folder / "checkpoints").is_dir():
        return find_checkpoint(str(folder / "checkpoints"))
    if not found:
        problem = "holds no last.ckpt; name a checkpoint" if folder.is_dir() else "no such checkpoint; check the path"
        raise MissingFileError(f"{checkpoint}: {problem}")
    return found[-1]


def _best(folder: Path, mode: str) -> Path:
    """Of the checkpoints with the best values, the one whose name has the best of all, the newest of several such."""
    found = [path for path in folder.glob("best-*.ckpt") if path.exists()]
    found = [path for path in found if _value(path) == _value(path)]  # not a number is never best
    if not found:
        raise MissingFileError(
            f"{folder / 'best'}: there is no best-*.ckpt, as nothing was validated; name a checkpoint"
        )
    sign = -1 if mode == "max" else 1
    return min(found, key=lambda path: (sign * _value(path), -path.stat().st_mtime))


def _value(path: Path) -> float:
    """The value in the name of a checkpoint such as ``best-step=200-val_loss=1.2345-v1.ckpt``."""
    found = re.search(r"=(-?[\d.]+|-?inf)(?:-v\d+)?\.ckpt$", path.name)
    return float(found[1]) if found else math.nan
