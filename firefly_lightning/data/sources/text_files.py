"""Text of files, unpacked where they are compressed, in UTF-8 or what their mark says; else told what they are."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from firefly_lightning.errors import FireflyError, reason

COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0", ".bz2": b"BZh"}
"""The first bytes of a compressed file, by the suffix that it should have; a file is known by the bytes."""

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""The encoding that a byte order mark stands for; UTF-32's little-endian one begins as that of UTF-16 does."""

_FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV in UTF-8",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a rar archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it, or use gzip or zstd",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; save it as .parquet or .jsonl",
    b"SQLite format 3\0": "an SQLite database; export its table as CSV or JSON lines",
    b"\xd0\xcf\x11\xe0": "an old Office file; save the sheet as CSV in UTF-8",
    b"%PDF": "a PDF; rows are read from text",
    b"\x89HDF": "an HDF5 file; save it as .parquet or .jsonl",
    b"\x93NUMPY": "a NumPy array; save it as .parquet or .jsonl",
    b"\x80\x04": "a Python pickle; save it as .parquet or .jsonl",
    b"\x80\x05": "a Python pickle; save it as .parquet or .jsonl",
}
"""What a file is that holds no text, and what to do with it, by its first bytes."""

_TAR = slice(257, 262)
"""Where the mark of a tar archive is."""


class TextFile(NamedTuple):
    """An open file of text.

    Attributes:
        bytes: Its bytes, unpacked, from the first one on.
        encoding: How they are encoded.
    """

    bytes: BinaryIO
    encoding: str


def format_of(source: str) -> str:
    """The suffix that says what a file holds: ``.jsonl`` of ``rows.jsonl``, and of ``rows.jsonl.gz``."""
    path = Path(source)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def is_compressed(source: str) -> bool:
    """Whether a file is compressed, by its first bytes."""
    with Path(source).open("rb") as file:
        return _compression(file.read(8)) is not None


def is_plain(source: str) -> bool:
    """Whether a file of text is neither compressed nor in another encoding than UTF-8.

    Raises:
        FireflyError: If it holds no text.
        OSError: If the system does not let it be read.
    """
    with open_text(source) as file:
        return file.encoding == "utf-8-sig" and not is_compressed(source)


@contextmanager
def open_text(source: str) -> Iterator[TextFile]:
    """Opens a file of text for reading.

    Raises:
        FireflyError: If the file holds no text, or its packing is damaged; in the block too.
        OSError: If the system does not let it be read.
    """
    with Path(source).open("rb") as file:
        compression = _compression(file.read(8))
        file.seek(0)
        try:
            with _unpacked(file, compression) as unpacked:
                start = unpacked.peek(512)[:512]
                encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
                if encoding == "utf-8-sig":
                    _check_text(start, source)
                yield TextFile(cast(BinaryIO, unpacked), encoding)
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise _damaged(source, error) from error
        except OSError as error:  # gzip, bz2 and zstd say so of damage; the system gives a number
            if compression is None or error.errno is not None or isinstance(error, FireflyError):
                raise
            raise _damaged(source, error) from error


def read_lines(source: str) -> Iterator[tuple[int, str]]:
    r"""Streams (number, line) of a text file; a line ends with ``\n`` alone, and keeps it.

    Raises:
        FireflyError: If the file holds no text, is damaged, or a line is not encoded as it should be; with the line.
    """
    with open_text(source) as file:
        if file.encoding != "utf-8-sig":
            yield from _decoded_lines(file, source)
            return
        yield from decode_lines(source, enumerate(file.bytes, 1))


def decode_lines(source: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str]]:
    """The text of lines in UTF-8, each with its number.

    Raises:
        FireflyError: If a line is not UTF-8.
    """
    for number, line in lines:
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_encoded(source, number, error) from error
        yield number, text


def not_encoded(source: str, line: int, error: UnicodeDecodeError) -> FireflyError:
    """The error for bytes that belong to no text of a file's encoding."""
    byte = error.object[error.start]
    if error.encoding.startswith("utf-8"):
        advice = "is not UTF-8; convert the file, for example with: iconv -f GB18030 -t UTF-8"
    else:
        advice = f"is not {error.encoding.upper()}, which the mark at its beginning says; save the file anew"
    return FireflyError(f"{source}:{line}: byte 0x{byte:02x} {advice}")


def _decoded_lines(file: TextFile, source: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(file.bytes, file.encoding, newline="\n"), 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise not_encoded(source, number + 1, error) from error


def _compression(start: bytes) -> str | None:
    return next((suffix for suffix, mark in COMPRESSIONS.items() if start.startswith(mark)), None)


def _unpacked(file: Any, compression: str | None) -> Any:
    """A buffered reader of what a file holds; it can look ahead (``peek``)."""
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".bz2":
        return bz2.BZ2File(file)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    return file


def _check_text(start: bytes, source: str) -> None:
    found = next((what for mark, what in _FOREIGN.items() if start.startswith(mark)), None)
    if start[_TAR] == b"ustar":
        found = "a tar archive; unpack it"
    elif start and not start.strip(b"\0"):
        found = "filled with zeros, as a crash may leave a file; download or make it again"
    elif found is None and b"\0" in start[:2]:
        order = "BE" if start[:1] == b"\0" else "LE"
        found = f"UTF-16 without the mark that says so; convert it, for example with: iconv -f UTF-16{order} -t UTF-8"
    if found:
        raise FireflyError(f"{source}: is {found}")


def _damaged(source: str, error: Exception) -> FireflyError:
    return FireflyError(f"{source}: is damaged or cut off, {reason(error)}; compress or download it again")
