"""A folder of the token cache: used where it is whole, and else made by one process while others wait for it.

Its digests are checked once a process: a byte that has changed on the disk would be learned like any other. For 1.65
million rows, 1.4 GB, that takes 0.2 s where they are in the system's cache, and else what the disk needs: 1.3 s where
``dd`` needs 1.1 s for the same file. Reading ahead, by advice to the system, was no faster there.
"""

import errno
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from firefly_lightning.data.tokenized_rows import REPORT_FILE, ROWS_FILE
from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.files.atomic import whole_folder
from firefly_lightning.files.manifest import (
    check_files,
    check_listed,
    entry_of,
    listed_files,
    read_manifest,
    write_manifest,
)
from firefly_lightning.files.versions import Version, version_of

DIGESTS_FILE = "digests.json"
"""File of a cache folder with the sizes and digests of its other files."""

_CURE = "it is made anew"
_WAITS = (5.0, 60.0)
"""Seconds of waiting for another process until the first line that says so, and between the lines after it."""


def ensure_folder(folder: Path, fill: Callable[[Path], None], what: str) -> None:
    """Makes a folder if it is not there or is damaged; of several processes one does so, and the others wait.

    Nothing is written, and nothing locked, where the folder is whole already.

    Args:
        folder: The folder, whose name says what belongs into it.
        fill: Writes all files of the folder into another, empty one.
        what: What is in the folder, in messages.

    Raises:
        FireflyError: If ``fill`` raises one, or the folder cannot be written.
    """
    if is_whole(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), what):
            if not is_whole(folder, says=True):
                with whole_folder(folder, durable=False) as partial:
                    fill(partial)
                    entries = {file.name: entry_of(file, durable=False) for file in partial.iterdir()}
                    write_manifest(partial / DIGESTS_FILE, entries, durable=False)
    except FireflyError:  # a FireflyError may be an OSError too
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        answer = os.strerror(error.errno) if error.errno else str(error)
        cure = f"{'free some space, or ' if full else ''}set data.cache_dir to another folder"
        raise FireflyError(f"{folder.parent}: {answer}; {cure}") from error


def is_whole(folder: Path, says: bool = False) -> bool:
    """Whether a folder of the cache is there and undamaged; with ``says``, a line tells what is damaged."""
    if not folder.is_dir():
        return False
    try:
        _check(folder, *(version_of(folder / name) for name in (DIGESTS_FILE, ROWS_FILE, REPORT_FILE)))
    except (FireflyError, OSError) as error:
        if says:
            damage = describe_os_error(error) if isinstance(error, OSError) and error.strerror else str(error)
            _say(damage if damage.endswith(_CURE) else f"{damage}; {_CURE}")
        return False
    return True


@lru_cache
def _check(folder: Path, *versions: Version) -> None:
    """Checks the digests of a folder; those of the same versions of its files only once a process."""
    path = folder / DIGESTS_FILE
    entries = listed_files(path, read_manifest(path, _CURE), _CURE)
    check_listed(path, entries, (ROWS_FILE, REPORT_FILE), _CURE)
    check_files(folder, entries, _CURE)


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock that no two processes hold at a time; says for which process it waits."""
    if path.is_dir():
        raise FireflyError(f"{path}: is a folder in the place of a lock; remove it")
    lock = FileLock(path)
    for wait in itertools.chain(_WAITS, itertools.repeat(_WAITS[-1])):
        try:
            lock.acquire(timeout=wait)
            break
        except Timeout:
            _say(f"waiting for {_holder(path)}, to make {what}")
    try:
        with suppress(OSError):  # a full disk is met again, by what is made under the lock
            path.write_text(f"{os.getpid()} {platform.node()}", "utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """The process that holds a lock, as it has written into its file, and whether it is stopped."""
    try:
        process, _, machine = path.read_text("utf-8").partition(" ")
        number = int(process)
    except (OSError, ValueError):
        return "another process"
    if machine != platform.node():
        return f"process {number} of {machine}"
    with suppress(OSError):
        if "\nState:\tT" in Path(f"/proc/{number}/status").read_text("utf-8"):
            return f"process {number}, which is stopped (kill -CONT {number} lets it go on, kill -9 {number} ends it)"
    return f"process {number}"


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)
