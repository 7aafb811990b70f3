"""What each process has written of a checkpoint, told to the first process by a file in the checkpoint's folder."""

import json
from pathlib import Path

from firefly_lightning.files.manifest import FileEntry


def entries_file(folder: Path, rank: int) -> Path:
    """The file by which a process says that its share is complete; there only until the checkpoint is.

    Args:
        folder: Folder of the checkpoint, under its temporary name.
        rank: Number of the process.
    """
    return folder / f".entries-{rank}.json"


def leave_entries(folder: Path, rank: int, files: dict[str, FileEntry]) -> None:
    """Says that the files of a process are written, once they are; the file is there as a whole or not at all."""
    written = entries_file(folder, rank).with_suffix(".partial")
    written.write_text(json.dumps(files), "utf-8")
    written.replace(entries_file(folder, rank))


def take_entries(folder: Path, rank: int) -> dict[str, FileEntry]:
    """The entries that a process has left; removes their file."""
    file = entries_file(folder, rank)
    entries: dict[str, FileEntry] = json.loads(file.read_text("utf-8"))
    file.unlink()
    return entries
