"""Large files read and written past the system's cache of pages, where it lets us.

What is read once and written once gains nothing from that cache: filling it costs more than the disk, on a virtual
machine several times as much, and pushes out what others have there.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PIECE = 16 << 20
"""Most bytes that are read at once."""

_BLOCK = 4096  # what O_DIRECT asks places in files and in memory to be multiples of; no disk has larger sectors
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only


class DirectReader:
    """A file, any part of which can be read.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path, os.O_RDONLY)
        self._buffer = mmap.mmap(-1, PIECE + 2 * _BLOCK)  # begins where a page does
        self._bytes = np.frombuffer(self._buffer, np.uint8)

    def read(self, start: int, size: int) -> Bytes:
        """(size,) bytes from ``start`` on, at most ``PIECE`` of them; they last until the next call.

        Raises:
            EOFError: If the file ends before.
        """
        lead = start % _BLOCK
        wanted = lead + size
        done, end = 0, wanted + -wanted % _BLOCK
        while done < wanted:
            part = memoryview(self._buffer)[done:end]
            read = _retry(self._file, os.preadv, [part], start - lead + done)
            if not read:
                raise EOFError(f"the file ends {wanted - done} bytes before its tensors do")
            done += read
        return self._bytes[lead:wanted]

    def pieces(self, start: int, size: int) -> Iterator[Bytes]:
        """The bytes from ``start`` on, in pieces of at most ``PIECE``, each of which lasts until the next."""
        for first in range(start, start + size, PIECE):
            yield self.read(first, min(PIECE, start + size - first))

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def read_pieces(path: Path, start: int, size: int) -> Iterator[Bytes]:
    """Part of a file in pieces; see :meth:`DirectReader.pieces`."""
    with closing(DirectReader(path)) as reader:
        yield from reader.pieces(start, size)


class DirectWriter:
    """A new file that is written from its beginning to its end, while the next bytes are being fetched.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._buffers = [mmap.mmap(-1, PIECE) for _ in range(2)]
        self._filled = self._position = 0
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "DirectWriter":
        return self

    def write(self, data: Bytes) -> None:
        """Adds (bytes,) to the file; they may change afterwards."""
        while len(data):
            room = np.frombuffer(self._buffers[0], np.uint8)[self._filled :]
            room[: len(data)] = data[: len(room)]
            self._filled += len(data[: len(room)])
            data = data[len(room) :]
            if self._filled == PIECE:
                self._send()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._send()
                self._wait()
        finally:
            self._thread.shutdown()
            os.close(self._file)

    def _send(self) -> None:
        """Has what is in the buffer written, once what was in the other is."""
        self._wait()
        part = memoryview(self._buffers[0])[: self._filled]
        self._under_way = self._thread.submit(_write, self._file, part, self._position)
        self._position += self._filled
        self._filled = 0
        self._buffers.reverse()

    def _wait(self) -> None:
        if self._under_way:
            self._under_way.result()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system that knows only the cache


def _write(file: int, data: memoryview, position: int) -> None:
    while data:
        if len(data) % _BLOCK:  # the end of a file, or what a full disk left
            _through_cache(file)
        written = _retry(file, os.pwrite, data, position)
        position += written
        data = data[written:]


def _retry(file: int, call: Any, data: Any, position: int) -> int:
    """A call that is made through the cache where the system does not take it otherwise."""
    try:
        return int(call(file, data, position))
    except OSError as error:
        if error.errno != errno.EINVAL or not _through_cache(file):
            raise
        return int(call(file, data, position))


def _through_cache(file: int) -> bool:
    """Ends direct access; whether there was any."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
