"""Modes of files: those that a new file has by the process's umask, whichever library has made it."""

import os
import stat
from pathlib import Path

_PRIVATE = 0o600
"""Mode of the files that safetensors writes, whatever the umask."""


def follow_umask(folder: Path) -> None:
    """Gives files for their owner alone, in a folder and those in it, the mode of a new file.

    Files with a second name, which may be another's, and links stay as they are.

    Args:
        folder: A folder of this process's, complete but not yet under its name.
    """
    sample = folder / ".mode"
    with sample.open("x") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    sample.unlink()
    for root, _, names in os.walk(folder) if mode != _PRIVATE else ():
        for name in names:
            path = Path(root, name)
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == _PRIVATE and found.st_nlink == 1:
                path.chmod(mode)
