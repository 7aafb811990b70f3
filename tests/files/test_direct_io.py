"""Files put together from ranges of others, whatever a file system lets us do and wherever ranges begin."""

import errno
import fcntl
import itertools
import os
import threading
import time

import numpy as np
import pytest

from firefly_lightning.files import direct_io
from firefly_lightning.files.direct_io import FileRange, read_rows, write_file
from tests.support.helpers import share_blocks

SIZE = 300_001


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def refuse_direct(monkeypatch):
    """A file system that opens a file for direct access, but does not read or write it so."""

    def refusing(call):
        def checked(file, buffers, position, *flags):
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(file, buffers, position, *flags)

        return checked

    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(os, "pwritev", refusing(os.pwritev))


WAYS = {
    "as it is": lambda monkeypatch: None,
    "nothing cached": lambda monkeypatch: monkeypatch.setattr(direct_io, "_IF_CACHED", None),
    "only the cache": lambda monkeypatch: monkeypatch.setattr(direct_io, "_DIRECT", 0),
    "refused late": refuse_direct,
    "blocks shared": share_blocks,
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(direct_io, "PIECE", 1 << 16)
    WAYS[request.param](monkeypatch)


@pytest.mark.usefixtures("way")
def test_a_file_of_ranges_and_arrays(source, tmp_path):
    content = source.read_bytes()
    ranges = [(0, SIZE), (4095, 2), (1, 0), (70_001, 131_072), (SIZE - 1, 1), (4096, 65_536)]
    header = np.arange(77, dtype=np.uint8)
    written = list(write_file(tmp_path / "out", [header, *(FileRange(source, *pair) for pair in ranges), header]))
    expected = header.tobytes() + b"".join(content[start : start + size] for start, size in ranges) + header.tobytes()
    assert (tmp_path / "out").read_bytes() == expected
    assert sum(written) == len(expected)
    pieces = FileRange(source, 5, 200_000).pieces()
    assert b"".join(piece.tobytes() for piece in pieces) == content[5:200_005]


def test_blocks_are_shared_where_they_lie_alike(source, tmp_path, monkeypatch):
    shared = share_blocks(monkeypatch)
    start = 2 * 4096 + 100
    parts = [np.zeros(4096 + 100, np.uint8), FileRange(source, start, 50_000), FileRange(source, 1, 50_000)]
    written = list(write_file(tmp_path / "out", parts))
    content = source.read_bytes()
    expected = bytes(4096 + 100) + content[start : start + 50_000] + content[1:50_001]
    assert (tmp_path / "out").read_bytes() == expected
    inner = range(3 * 4096, start + 50_000 - (start + 50_000) % 4096)  # whole blocks of the source
    assert shared == [inner]
    assert written[0] == len(inner)
    assert sum(written) == len(expected)


@pytest.mark.usefixtures("way")
def test_rows_in_any_order(source):
    width, count = 30, 9000
    matrix = np.frombuffer(source.read_bytes(), np.uint8)[11 : 11 + width * count].reshape(count, width)
    rows = np.random.default_rng(1).integers(0, count, 500)
    rows[:3] = [count - 1, 0, 0]
    assert np.array_equal(read_rows(FileRange(source, 11, width * count), rows, width), matrix[rows])


@pytest.mark.usefixtures("way")
def test_a_range_past_the_end(source, tmp_path):
    with pytest.raises(EOFError):
        list(write_file(tmp_path / "out", [FileRange(source, SIZE - 5, 10)]))


def test_threads_that_share_a_file_may_all_be_refused(source, tmp_path, monkeypatch):
    """One ends direct access to the file while others still wait for the answer to a direct call of theirs."""
    monkeypatch.setattr(direct_io, "PIECE", 1 << 16)
    others, first, write = threading.Event(), itertools.count(), os.pwritev

    def refusing(file, buffers, position):
        if not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            return write(file, buffers, position)
        if next(first):
            others.set()
            while fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                time.sleep(0.001)
        else:
            others.wait(10)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwritev", refusing)
    list(write_file(tmp_path / "out", [FileRange(source, 0, SIZE)]))
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


def test_what_is_refused_without_direct_access_is_an_error(source, tmp_path, monkeypatch):
    def refusing(file, buffers, position):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwritev", refusing)
    with pytest.raises(OSError, match="Invalid argument"):
        list(write_file(tmp_path / "out", [FileRange(source, 0, SIZE)]))
