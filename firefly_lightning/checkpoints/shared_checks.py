"""Checks of files that the processes of a run divide among those of each machine, so that it reads no byte twice.

Processes need not call this together: each takes what no other has taken, in the store by which they have found each
other, and waits only for what others have taken.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from firefly_lightning.files.manifest import in_threads
from firefly_lightning.files.versions import version_of

PATIENCE = 300.0
"""Seconds after which a file that another process has taken is checked here, too."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_WELL, _FAILED = b"well", b"failed"


def once_a_machine(check: Callable[[Path], None], files: Sequence[Path]) -> None:
    """Calls ``check`` on each file, of whose versions each is checked by one process of the run on this machine.

    Args:
        check: Raises if something is wrong with a file; a process that finds it wrong has the others find it, too.
        files: The files.
    """
    store = _store()
    if store is None:
        in_threads(check, files)
        return
    keys = {file: f"firefly/{_machine()}/{version_of(file)}" for file in files}

    def check_if_free(file: Path) -> None:
        if store.add(f"{keys[file]}/taken", 1) == 1:
            found = _FAILED
            try:
                check(file)
                found = _WELL
            finally:
                store.set(keys[file], found)

    in_threads(check_if_free, files)
    for file in files:
        if not _found_well(store, keys[file]):
            check(file)


def _found_well(store: Any, key: str) -> bool:
    """Whether another process has found a file whole; waits until one has said so, or not."""
    end = time.monotonic() + PATIENCE
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return bool(store.get(key) == _WELL)


def _store() -> Any:
    """What the processes of the run have in common; None where this process is alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


@cache
def _machine() -> str:
    """A name of this machine, the same in all its processes."""
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:  # no Linux
        import socket

        return socket.gethostname()
