"""Has one process at a time write the figures of a run, however often the run is started."""

import fcntl
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from firefly_lightning.errors import FireflyError

LOCK = ".lock"
"""Name of a file in the folder of a run that trains."""


class RunLock:
    """What a run holds while it trains; the system lets go of it when the process ends, however it ends."""

    def __init__(self) -> None:
        self._files: list[BinaryIO] = []

    def take(self, folders: Iterable[Path]) -> None:
        """Takes folders for this process.

        Raises:
            FireflyError: If another process has one of them.
        """
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("ab")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.close()
                self.release()
                raise FireflyError(
                    f"{folder}: another run writes its figures there at this moment; wait until it has ended, or "
                    "choose another trainer.default_root_dir"
                ) from error
            except OSError:  # a file system without locks
                file.close()
                continue
            self._files.append(file)

    def release(self) -> None:
        """Lets go of all folders."""
        for file in self._files:
            with suppress(OSError):
                Path(file.name).unlink()
            file.close()
        self._files = []
