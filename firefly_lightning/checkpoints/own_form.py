"""Checkpoints in an engine's own form: their digests, by which damage to any of their files is found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firefly_lightning.checkpoints.contents import DAMAGED, OF_A_RUN, check_contents
from firefly_lightning.checkpoints.layout import DIGESTED_KEY, DIGESTS, TRAINER_FILE, WRITER_KEY
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import MissingFileError
from firefly_lightning.files.manifest import (
    FileEntry,
    check_files,
    check_listed,
    entry_of,
    listed_files,
    read_manifest,
    write_manifest,
)

_READ_BY_ENGINES = (".pt", ".ckpt", ".safetensors", ".bin")
"""Endings of the files that engines look for in a folder, whatever these are called."""


def files_of(folder: Path) -> list[str]:
    """Names of all files of a checkpoint but the list of digests, those in inner folders as ``inner/name``."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != DIGESTS)


def finish_own(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Adds the digests to a checkpoint that has all its other files; one process does so, last.

    Args:
        folder: Folder of the checkpoint, under its temporary name.
        files: Entries of all files but ``trainer.ckpt``, by name.
    """
    write_manifest(folder / DIGESTS, {**files, TRAINER_FILE: entry_of(folder / TRAINER_FILE)})


def read_own(folder: Path, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Contents of a checkpoint's ``trainer.ckpt``, once its files have been found to be whole.

    Processes that call this together check a share of the files each. A checkpoint of an older release has no digests.

    Args:
        folder: Folder of the checkpoint.
        rank: Number of this process.
        processes: Number of the processes that check the files.

    Raises:
        MissingFileError: If a file is missing; the message names it.
        FireflyError: If a file is cut or changed, or the contents are not what a run saves.
    """
    path = folder / DIGESTS
    if path.is_file():
        entries = listed_files(path, read_manifest(path, DAMAGED), DAMAGED)
        there = [name for name in files_of(folder) if name.endswith(_READ_BY_ENGINES)]
        check_listed(path, entries, [TRAINER_FILE, *there], DAMAGED)
        share = [TRAINER_FILE, *sorted(entries.keys() - {TRAINER_FILE})[rank::processes]]
        check_files(folder, {name: entries[name] for name in share}, DAMAGED)
    trainer = load_file(folder / TRAINER_FILE, "cpu")
    check_contents(trainer, folder / TRAINER_FILE, required=(*OF_A_RUN, WRITER_KEY))
    if trainer[WRITER_KEY].get(DIGESTED_KEY) and not path.is_file():
        raise MissingFileError(f"{path}: missing; {DAMAGED}")
    return trainer
