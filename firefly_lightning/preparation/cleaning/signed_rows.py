"""What is known of a row without comparing it with others, worked out in portions and kept on the disk.

Each portion has three files: the lines of its rows (``NAME.rows``), their texts as they are compared (``NAME.texts``),
and a table that has a line for each row (``NAME.arrow``), which appears when all are whole.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from firefly_lightning.data.sources.any_record import Reading, read_leniently
from firefly_lightning.data.sources.chunks import Chunk, records_of
from firefly_lightning.data.sources.row_texts import printable
from firefly_lightning.files.atomic import whole_file
from firefly_lightning.preparation.cleaning.duplicates import (
    BANDS,
    bands,
    encoded,
    normalise,
    signatures,
)
from firefly_lightning.preparation.cleaning.lines import line_of
from firefly_lightning.preparation.cleaning.pieces import piece_hashes
from firefly_lightning.preparation.cleaning.row_checks import kind_of, texts_of, what_is_wrong

SHOWN = 200
"""Number of characters of a text that the report shows."""

BAND = [f"band_{number}" for number in range(BANDS)]

SCHEMA = pa.schema(
    {
        "number": pa.uint64(),  # of the record in its source
        "kind": pa.string(),
        "fault": pa.string(),  # what is wrong with the row by itself
        "shown": pa.string(),  # the beginning of the text of a row with a fault
        "raw": pa.bool_(),  # whether training reads no such rows
        "end": pa.uint64(),  # of the row's line in the file of lines
        "texts_end": pa.uint64(),  # of its texts, the whole one and that of the targets, in the file of texts
        "target_size": pa.uint32(),  # bytes of the latter
        "question": pa.uint64(),  # hash of what the row asks first; 0 if it asks nothing
        "exact_0": pa.uint64(),  # hash of all that is compared, in two halves
        "exact_1": pa.uint64(),
        "pieces": pa.uint32(),  # number of shingles of the whole text
        **dict.fromkeys(BAND, pa.uint64()),
    }
)


@dataclass(frozen=True)
class ChunkSigner:
    """Works out what is known of the rows of a portion; this object can be sent to another process.

    Args:
        lengths: Numbers of characters that a text may have; None for validation rows, which are kept whatever they are.
    """

    lengths: range | None

    def __call__(self, portion: tuple[Path, Chunk]) -> int:
        """Writes the table and the lines of a portion, unless they are there; returns the number of its rows."""
        table, chunk = portion
        if table.exists():
            return chunk.size
        columns = Columns(*([] for _ in Columns._fields))
        lines, texts = (whole_file(table.with_suffix(suffix), durable=False) for suffix in (".rows", ".texts"))
        with lines as line_file, texts as text_file:
            for number, row in records_of(chunk):
                self._add(columns, line_file, text_file, chunk.source, number, row)
        with whole_file(table, durable=False) as file:
            schema = SCHEMA.with_metadata({"source": os.fsencode(chunk.source)})
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_table(columns.table(schema))
        return chunk.size

    def _add(
        self, columns: "Columns", lines: BinaryIO, compared: BinaryIO, source: str, number: int, row: dict[str, Any]
    ) -> None:
        said = read_leniently(row)
        kind, texts = kind_of(said, source), texts_of(said)
        fault, line = None, b""
        if self.lengths is not None:
            written = line_of(row, f"{source}:{number}")
            fault = what_is_wrong(said, kind, texts, self.lengths) or (None if written else "broken characters")
            line = written if written and not fault else b""
        whole, target = (b"", b"") if fault else texts.compared()
        columns.add(number, kind, fault, texts.whole(), said)
        columns.add_texts(whole, target)
        lines.write(line)
        columns.end.append(lines.tell())
        compared.write(whole + target)
        columns.texts_end.append(compared.tell())


class Columns(NamedTuple):
    """The columns of a portion's table, as they are filled; names are those of the table, whose bands come last.

    In the place of the number of its pieces stands a row's whole text, from which they are counted at the end.
    """

    number: list[int]
    kind: list[str]
    fault: list[str | None]
    shown: list[str | None]
    raw: list[bool]
    end: list[int]
    texts_end: list[int]
    target_size: list[int]
    question: list[int]
    exact_0: list[int]
    exact_1: list[int]
    pieces: list[bytes]

    def add(self, number: int, kind: str, fault: str | None, whole: str, said: Reading) -> None:
        """Adds what a row says; its whole text is shown where it has a fault."""
        self.number.append(number)
        self.kind.append(printable(kind))
        self.fault.append(fault)
        self.shown.append(printable(whole[:SHOWN]) if fault else None)
        self.raw.append(said.raw)
        self.question.append(0 if fault else _question(said))

    def add_texts(self, whole: bytes, target: bytes) -> None:
        """Adds the texts of a row as they are compared."""
        exact = xxhash.xxh3_128_intdigest(b"%d:%b%b" % (len(whole), whole, target))
        self.exact_0.append(exact >> 64)
        self.exact_1.append(exact & (1 << 64) - 1)
        self.target_size.append(len(target))
        self.pieces.append(whole)

    def table(self, schema: pa.Schema) -> pa.Table:
        """The columns as a table, with the bands of all rows."""
        pieces = piece_hashes(self.pieces)
        hashes = dict(zip(BAND, bands(signatures(pieces)), strict=True))
        return pa.table({**self._asdict(), "pieces": pieces.distinct(), **hashes}, schema)


class SignedRows:
    """Rows that were looked at, of which only what is asked for is read from the disk.

    Args:
        tables: The tables of all portions, in the order of the rows.
        validation_tables: How many of them are of validation rows, which come first.

    Attributes:
        starts: Number of the first row of each portion, and at the end the number of all rows.
        validation: Number of validation rows.
    """

    def __init__(self, tables: Sequence[Path], validation_tables: int) -> None:
        self.tables, self.validation_tables = tables, validation_tables
        self.starts, self._sources = [0], []
        for table in tables:
            with pa.OSFile(str(table)) as file:
                read = pa.ipc.open_file(file)
                rows = sum(read.get_batch(at).num_rows for at in range(read.num_record_batches))
                self.starts.append(self.starts[-1] + rows)
                self._sources.append(os.fsdecode(read.schema.metadata[b"source"]))
        self.validation = self.starts[validation_tables]

    def __len__(self) -> int:
        return self.starts[-1]

    def portion(self, at: int) -> range:
        """The rows of a portion."""
        return range(self.starts[at], self.starts[at + 1])

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, of all rows."""
        column = np.empty(len(self), SCHEMA.field(name).type.to_pandas_dtype())
        for at, table in enumerate(self.tables):
            portion = self.portion(at)
            # A column that was read holds the memory of all columns: one portion at a time, and copied.
            column[portion.start : portion.stop] = _read(table, [name])[name].to_numpy()
        return column

    def sound(self) -> NDArray[np.bool_]:
        """Whether each row has no fault."""
        return np.concatenate([_read(table, ["fault"])["fault"].is_null().to_numpy() for table in self.tables])

    def columns(self, at: int, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of one portion, in the order of their names."""
        read = _read(self.tables[at], names)
        return {name: read[name].to_pylist() for name in names}

    def source(self, row: int) -> str:
        """The file or dataset that a row is from."""
        return self._sources[self.place(row)[0]]

    def where(self, row: int) -> str:
        """The file and line of a row."""
        at, within = self.place(row)
        return f"{self.source(row)}:{_read(self.tables[at], ['number'])['number'][within]}"

    def line(self, row: int) -> bytes:
        """The line of a row."""
        at, within = self.place(row)
        content, ends = self.lines(at)
        return content[ends[within] : ends[within + 1]]

    def lines(self, at: int) -> tuple[bytes, NDArray[np.int64]]:
        """The lines of a portion, and where each begins, and their end."""
        ends = np.append(0, _read(self.tables[at], ["end"])["end"].to_numpy()).astype(np.int64)
        return self.tables[at].with_suffix(".rows").read_bytes(), ends

    def shown(self, row: int) -> str:
        """The beginning of the text of a row."""
        return printable(texts_of(read_leniently(json.loads(self.line(row)))).whole()[:SHOWN])

    def place(self, row: int) -> tuple[int, int]:
        """The portion of a row, and the row's number in it."""
        at = bisect_right(self.starts, row) - 1
        return at, row - self.starts[at]


def _question(said: Reading) -> int:
    """A hash of what a row asks first, as it is compared; 0 for a document or a raw row."""
    question = normalise(said.turns[0][0]) if said.turns else ""
    return xxhash.xxh3_64_intdigest(encoded(question)) if question else 0


def _read(table: Path, names: Sequence[str]) -> pa.Table:
    with pa.OSFile(str(table)) as file:
        fields = [SCHEMA.get_field_index(name) for name in names]
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields)).read_all()
