"""Finds the checkpoint that a path means."""

from pathlib import Path

from firefly_lightning.checkpoints.layout import MANIFEST, TRAINER_FILE
from firefly_lightning.errors import MissingFileError
from firefly_lightning.files.atomic import replaced_path, replaced_paths


def find_checkpoint(checkpoint: str) -> Path:
    """The checkpoint that a path means.

    A checkpoint is a file or a folder; a path to a file inside such a folder means the folder too. A folder of several
    checkpoints, and the name ``last`` inside it, mean its latest ``last*.ckpt``, or its latest ``step=*.ckpt`` where it
    has no ``last*.ckpt``.

    Raises:
        MissingFileError: If the path means no checkpoint.
    """
    path = Path(checkpoint).expanduser()
    for place in (path, path.parent) if path.is_file() else (path,):
        if any((place / name).is_file() for name in (TRAINER_FILE, MANIFEST)):
            return place
    if path.is_file():
        return path
    folder = path.parent if path.name == "last" and not path.exists() else path
    if (replaced := replaced_path(path)).exists():
        return replaced
    # A name may link to a checkpoint that a save has since removed.
    candidates = [file for file in folder.glob("last*.ckpt") if file.exists()]
    candidates += replaced_paths(folder, "last*.ckpt")
    candidates = candidates or list(folder.glob("step=*.ckpt"))
    found = sorted(candidates, key=lambda file: file.stat().st_mtime)
    if not found:
        problem = "holds no last.ckpt; name a checkpoint" if folder.is_dir() else "no such checkpoint; check the path"
        raise MissingFileError(f"{checkpoint}: {problem}")
    return found[-1]
