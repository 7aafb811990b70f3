"""Damages a checkpoint in an engine's own form, wherever it can be."""

import shutil
from pathlib import Path

import pytest

from firefly_lightning.checkpoints.own_form import read_own
from firefly_lightning.errors import FireflyError
from tests.support.helpers import raised_line

PROCESSES = 2
"""Processes that share the work of looking for damage; what one of them finds ends all."""


def find(folder: Path) -> None:
    for rank in range(PROCESSES):
        read_own(folder, rank, PROCESSES)


def assert_damage_is_found(checkpoint: Path, copy: Path, places: int = 5) -> None:
    """Checks that a changed byte, a cut end and a missing file are found and named, in every file of a checkpoint.

    Args:
        checkpoint: The checkpoint, which stays as it is.
        copy: Where to copy it to, to damage it.
        places: At how many places of a file a byte is changed.
    """
    shutil.copytree(checkpoint, copy)
    find(copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file())
    assert len(files) > 2
    for file in files:
        whole = file.read_bytes()
        flips = {len(whole) * part // places for part in range(places)} | {len(whole) - 1}
        changed = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in sorted(flips)]
        for content in (*changed, whole[:-1], None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(FireflyError) as raised:
                find(copy)
            assert raised_line(raised).startswith(f"{file}: ")
        file.write_bytes(whole)
    find(copy)
