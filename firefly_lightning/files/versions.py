"""Whether a file is still the one that was read, without reading it again."""

import time
from pathlib import Path

_TICK = 0.02  # seconds; the clocks of file systems tick every few milliseconds

Version = tuple[int, ...]
"""Numbers that no two contents of a file share."""


def version_of(path: Path) -> Version:
    """Numbers that change whenever a file is written, also when its content is then changed back.

    A file that was written within the last tick of its file system's clock is waited for, so that what is written to it
    after this call gets another time.

    Args:
        path: The file.
    """
    status = path.stat()
    if abs(time.time_ns() - status.st_ctime_ns) < _TICK * 1e9:
        time.sleep(_TICK)
    # The last is the time of the last change of any kind, which no program can set.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
