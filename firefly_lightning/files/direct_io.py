"""Large files put together from parts of others: by sharing their blocks, or past the system's cache of pages.

A file system that copies on write (XFS, Btrfs) gives a new file the blocks of an old one at once, for nothing. On other
file systems they are read and written. Bytes that are read once and written once gain nothing from the cache of pages:
filling it costs more than the disk, on a virtual machine several times as much, and pushes out the pages of other
programs. Bytes that are in the cache already are read from there.
"""

import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PIECE = 16 << 20
"""Largest number of bytes that are read or written at once."""

THREADS = 4
"""Pieces under way at the same time: a disk is fastest with several to choose from. Each thread has two buffers."""

BLOCK = 4096
"""Bytes of which places in files and in memory must be multiples for direct access and for the sharing of blocks."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only, like RWF_NOWAIT
_IF_CACHED: int | None = getattr(os, "RWF_NOWAIT", None)
_CLONE_RANGE = 0x4020940D  # FICLONERANGE of ioctl_ficlonerange(2), which Python names from 3.12 on
_buffers = threading.local()


class FileRange(NamedTuple):
    """A range of bytes in a file.

    Attributes:
        file: The file.
        start: Position of the first byte of the range.
        size: Number of bytes in the range.
    """

    file: Path
    start: int
    size: int

    def pieces(self) -> Iterator[Bytes]:
        """The bytes in order, at most ``PIECE`` of them at once; the next piece overwrites the one before."""
        buffer = np.empty(min(PIECE, self.size), np.uint8)
        for start in range(0, self.size, PIECE):
            piece = buffer[: self.size - start]
            _read(self.file, self.start + start, piece)
            yield piece


def read_rows(matrix: FileRange, rows: npt.NDArray[np.int64], width: int) -> Bytes:
    """Some rows of a matrix that lies in a file row by row.

    Args:
        matrix: The range of the file that holds the matrix.
        rows: (rows,) numbers of the rows to read, in any order.
        width: Bytes in a row.

    Returns:
        (rows, width) bytes of the rows, in the order asked for.
    """
    taken = np.empty((len(rows), width), np.uint8)
    order = np.argsort(rows, kind="stable")
    ordered, cuts = rows[order], [0]
    while cuts[-1] < len(rows):  # rows that are near each other are read at once, with the rows between them
        cuts.append(int(np.searchsorted(ordered, ordered[cuts[-1]] + max(1, PIECE // width))))

    def take(cut: int) -> None:
        first, near = ordered[cuts[cut]], ordered[cuts[cut] : cuts[cut + 1]]
        window = _buffer("window", int(near[-1] + 1 - first) * width)
        _read(matrix.file, matrix.start + int(first) * width, window)
        taken[order[cuts[cut] : cuts[cut + 1]]] = window.reshape(-1, width)[near - first]

    for _ in _in_threads(take, range(len(cuts) - 1)):
        pass
    return taken


def write_file(path: Path, parts: Sequence[Bytes | FileRange], pool: ThreadPoolExecutor | None = None) -> Iterator[int]:
    """Writes a file that consists of arrays of bytes and of ranges of other files, one after another.

    Where the file system can share blocks, it shares those of a range that keeps its offset from the beginning of a
    block: nothing is read or written for them, and later writes to one file do not show in the other.

    Args:
        path: The file to write.
        parts: The arrays and ranges that the file consists of, in order.
        pool: Threads to write with, whose buffers serve several files: fresh memory takes longer than a copy.

    Yields:
        Number of bytes that have been written since the last time.
    """
    sizes = [part.size for part in parts]
    ends = np.cumsum(sizes, dtype=np.int64)
    file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(place: range) -> int:
        piece = _buffer("piece", len(place))
        done = 0
        while done < len(piece):
            index = int(np.searchsorted(ends, place.start + done, side="right"))
            part, offset = parts[index], place.start + done - int(ends[index]) + sizes[index]
            target = piece[done : done + sizes[index] - offset]
            if isinstance(part, FileRange):
                _read(part.file, part.start + offset, target)
            else:
                target[:] = part[offset : offset + len(target)]
            done += len(target)
        _write(file, piece, place.start)
        return done

    try:
        starts = (ends - sizes).tolist()
        shared = [_share(file, start, part) for start, part in zip(starts, parts, strict=True)]
        yield sum(map(len, shared))
        yield from _in_threads(write, _between(shared, int(ends[-1])), pool)
    finally:
        os.close(file)


def _share(file: int, start: int, part: Bytes | FileRange) -> range:
    """Gives a file, from ``start`` on, the blocks of a range of another; returns which bytes it shares, if any."""
    lead = -start % BLOCK
    size = (part.size - lead) // BLOCK * BLOCK
    if not isinstance(part, FileRange) or size <= 0 or (part.start - start) % BLOCK:
        return range(start, start)
    source = os.open(part.file, os.O_RDONLY)
    try:
        fcntl.ioctl(file, _CLONE_RANGE, struct.pack("qQQQ", source, part.start + lead, size, start + lead))
    except OSError:  # the file system shares no blocks or has larger ones, or the files are on two file systems
        return range(start, start)
    finally:
        os.close(source)
    return range(start + lead, start + lead + size)


def _between(shared: Sequence[range], size: int) -> list[range]:
    """The pieces of a file of ``size`` bytes that are not shared, and so must be written."""
    pieces: list[range] = []
    start = 0
    for part in [*filter(None, shared), range(size, size)]:
        pieces += [range(at, min(at + PIECE, part.start)) for at in range(start, part.start, PIECE)]
        start = part.stop
    return pieces


def _in_threads(
    work: Callable[[Any], Any], items: Sequence[Any], pool: ThreadPoolExecutor | None = None
) -> Iterator[Any]:
    with nullcontext(pool) if pool else ThreadPoolExecutor(THREADS) as threads:
        begun = [threads.submit(work, item) for item in items]
        try:
            for one in begun:
                yield one.result()
        finally:  # what is under way writes to a file that is closed next
            for one in begun:
                one.cancel()
            wait(begun)


def _buffer(name: str, size: int) -> Bytes:
    """(size,) bytes of this thread's buffer with the given name; the buffer begins where a page begins."""
    buffer: Bytes | None = getattr(_buffers, name, None)
    if buffer is None or len(buffer) < size:
        buffer = np.frombuffer(mmap.mmap(-1, max(size, PIECE + 2 * BLOCK)), np.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:size]


def _read(path: Path, start: int, target: Bytes) -> None:
    """Fills ``target``, (bytes,), with the bytes of a file from ``start`` on.

    Raises:
        EOFError: If the file ends before ``target`` is full.
    """
    if not _read_cached(path, start, target):
        lead = start % BLOCK
        wanted = lead + len(target)
        buffer = _buffer("read", wanted + -wanted % BLOCK)
        file = _open(path, os.O_RDONLY)
        try:
            _transfer(file, os.preadv, buffer, start - lead, wanted)
        finally:
            os.close(file)
        target[:] = buffer[lead:wanted]


def _read_cached(path: Path, start: int, target: Bytes) -> bool:
    """Fills ``target`` from the cache of pages alone; returns whether all of its bytes were there."""
    if _IF_CACHED is None:
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, [target.data], start, _IF_CACHED) == len(target)
    except OSError:  # none of the bytes is in the cache, or the file system cannot tell
        return False
    finally:
        os.close(file)


def _write(file: int, piece: Bytes, start: int) -> None:
    whole = len(piece) - len(piece) % BLOCK
    _transfer(file, os.pwritev, piece[:whole], start, whole)
    if whole < len(piece):  # the end of a file is no whole block, which direct access cannot write
        _through_cache(file)
        _transfer(file, os.pwritev, piece[whole:], start + whole, len(piece) - whole)


def _transfer(file: int, call: Any, buffer: Bytes, start: int, wanted: int) -> None:
    """Reads or writes until at least ``wanted`` bytes have been transferred."""
    done = 0
    while done < wanted:
        direct = _is_direct(file)  # before the call: another thread may end it, and this call may have had it
        try:
            count = call(file, [buffer[done:]], start + done)
        except OSError as error:
            # The file system knows only the cache, or the last call ended within a block, as on a full disk.
            if error.errno != errno.EINVAL or not direct:
                raise
            _through_cache(file)
            continue
        if not count:
            raise EOFError("the file ends before its tensors do")
        done += count


def _open(path: Path, flags: int) -> int:
    opened = partial(os.open, path, mode=0o666)
    try:
        return opened(flags | _DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return opened(flags)  # a file system that knows only the cache


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT)


def _through_cache(file: int) -> None:
    """Ends direct access to an open file, for all threads that use its descriptor."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)
