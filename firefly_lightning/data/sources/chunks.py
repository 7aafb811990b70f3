"""Consecutive records of a source, in portions that other processes read by themselves where that can be."""

import codecs
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from firefly_lightning.data.sources.records import DocumentPer, holds_json_lines, read_json_lines, read_records
from firefly_lightning.data.sources.text_files import decode_lines, is_plain
from firefly_lightning.errors import FireflyError, describe_os_error


class Chunk(NamedTuple):
    """Consecutive records of one source.

    Attributes:
        source: The file or dataset.
        size: Number of records.
        line: Number of the first line, where the records are lines of a file.
        span: Where these lines begin and end in the file, in bytes; None where the records came along.
        records: The records, each with its number, where they cannot be found again by their place.
    """

    source: str
    size: int
    line: int = 1
    span: tuple[int, int] | None = None
    records: Sequence[tuple[int, dict[str, Any]]] = ()


def read_chunks(source: str, size: int, document_per: DocumentPer = "line") -> Iterator[Chunk]:
    """Streams the records of a source in portions of ``size``, the last one smaller.

    Of a file of JSON lines that is neither compressed nor in another encoding than UTF-8, only the places of its lines
    are found here; whoever takes a portion reads it.

    Raises:
        FireflyError: If the source cannot be read, or a record of it that is read here.
    """
    try:
        if holds_json_lines(source) and is_plain(source):
            yield from _spans(source, size)
            return
    except OSError as error:
        raise FireflyError(describe_os_error(error, source)) from error
    records = read_records(source, document_per)
    while read := list(islice(records, size)):
        yield Chunk(source, len(read), records=read)


def records_of(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a portion, each with its number.

    Raises:
        FireflyError: As :func:`~firefly_lightning.data.sources.records.read_records` does.
    """
    if chunk.span is None:
        yield from chunk.records
        return
    start, end = chunk.span
    try:
        with Path(chunk.source).open("rb") as file:
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
    except OSError as error:
        raise FireflyError(describe_os_error(error, chunk.source)) from error
    yield from read_json_lines(chunk.source, decode_lines(chunk.source, enumerate(lines, chunk.line)))


def _spans(source: str, size: int) -> Iterator[Chunk]:
    with Path(source).open("rb") as file:
        start = end = count = 0
        first = 1
        for number, line in enumerate(file, 1):
            end += len(line)
            count += line.startswith(b"{") or not _is_blank(line, number)
            if count == size:
                yield Chunk(source, count, first, (start, end))
                start, first, count = end, number + 1, 0
        if count:
            yield Chunk(source, count, first, (start, end))


def _is_blank(line: bytes, number: int) -> bool:
    return not (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8", "replace").strip()
