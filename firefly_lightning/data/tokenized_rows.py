"""Tokenised rows of the cache, mapped into memory: their token ids, lengths, kinds and sources."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

REPORT_FILE = "report.json"
"""File of a cache folder: the source's name, its kinds in the order of their numbers, the counts of each kind, and what
was not read: by the name of a field, in how many rows it held text, and by fault, how many rows were passed over."""

ROWS_FILE = "rows.arrow"
"""File of a cache folder: the rows, in batches whose schema :mod:`firefly_lightning.data.row_batches` defines."""

Counts = dict[str, dict[str, int]]
"""The numbers that ``COUNTED`` names, for each kind: rows read, windows of documents, rows cut, left out or without a
last answer, tokens kept."""

COUNTED = ("rows", "windows", "truncated", "dropped", "no_target", "unanswered", "tokens", "target_tokens")

NO_WINDOW = -1
"""What stands in the place of a window's number for an instruction row, which is no document."""


class TokenizedRow(NamedTuple):
    """One row: (length,) token ids, and (length,) whether each token is learned."""

    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class TokenizedRows:
    """Rows of several cache folders, one after another.

    Args:
        folders: Cache folders made by :func:`firefly_lightning.data.token_cache.tokenize`.
        names: Name of each folder's source in messages.

    Attributes:
        counts: What each source holds, by kind.
        unused: Of each source, by the name of a field that is not read: in how many rows it holds text.
        faults: Of each source, by fault: how many rows were passed over, where they are counted and not refused.
        windows: (rows,) number of each row among the windows of its document, from 0; ``NO_WINDOW`` for other rows.
    """

    def __init__(self, folders: Sequence[Path], names: Sequence[str]) -> None:
        self.folders, self.names = list(folders), list(names)
        self.counts: list[Counts] = []
        self.unused: list[dict[str, int]] = []
        self.faults: list[dict[str, int]] = []
        self.kinds: list[str] = []
        self._batches: list[pa.RecordBatch] = []
        kinds: list[npt.NDArray[np.int32]] = []
        sizes: list[int] = []
        for folder in self.folders:
            report = json.loads((folder / REPORT_FILE).read_text("utf-8"))
            self.counts.append(report["counts"])
            self.unused.append(report["unused"])
            self.faults.append(report["faults"])
            renumbered = np.array([self._kind_id(kind) for kind in report["kinds"]], np.int32)
            batches = _map_batches(folder / ROWS_FILE)
            kinds += [renumbered[_numbers(batch.column("kind"))] for batch in batches]
            sizes.append(sum(batch.num_rows for batch in batches))
            self._batches += batches
        self.ends = np.cumsum(sizes)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths = _concatenate([np.diff(_numbers(batch.column("input_ids").offsets)) for batch in self._batches])
        self.target_tokens = _concatenate([_numbers(batch.column("target_tokens")) for batch in self._batches])
        self.kind_ids = _concatenate(kinds)
        self.windows = _concatenate([_numbers(batch.column("window")) for batch in self._batches])
        self.identities: npt.NDArray[np.uint64] = np.concatenate(
            [np.zeros(0, np.uint64), *(_numbers(batch.column("identity")) for batch in self._batches)]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> TokenizedRow:
        return self.stored(self.place(row))

    def place(self, row: int) -> int:
        """Which of the stored rows a row is; a subclass may keep several together as one."""
        return row

    def stored(self, place: int) -> TokenizedRow:
        """One of the rows that the folders hold, counted through all of them."""
        batch, index = self._locate(place)
        ids, mask = batch.column("input_ids"), batch.column("target_mask")
        first, last = ids.offsets[index].as_py(), ids.offsets[index + 1].as_py()
        return TokenizedRow(_numbers(ids.values[first:last]), _booleans(mask.values[first:last]))

    def of_source(self, index: int) -> npt.NDArray[np.int64]:
        """Numbers of the rows that come from one source."""
        return np.arange(self.ends[index - 1] if index else 0, self.ends[index])

    def describe(self, row: int) -> str:
        """Where a row came from: source, line and kind."""
        batch, index = self._locate(self.place(row))
        source = self.names[int(np.searchsorted(self.ends, row, side="right"))]
        window = f", window {self.windows[row] + 1}" if self.windows[row] > 0 else ""
        return f"{source}:{batch.column('number')[index].as_py()} ({self.kinds[self.kind_ids[row]]}{window})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is started afresh maps the files itself instead of being sent their content.
        return type(self), (self.folders, self.names)

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch], int(row - self._starts[batch])

    def _kind_id(self, kind: str) -> int:
        if kind not in self.kinds:
            self.kinds.append(kind)
        return self.kinds.index(kind)


def _map_batches(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _numbers(array: pa.Array) -> npt.NDArray[Any]:
    """A view of an array; pyarrow's to_numpy imports pandas, which takes as long as all else at a cached start."""
    return np.from_dlpack(array)


def _booleans(array: pa.BooleanArray) -> npt.NDArray[np.bool_]:
    """Unpacks booleans, of which Arrow keeps eight in a byte, the first in its lowest bit."""
    first, after = array.offset, array.offset + len(array)
    packed = np.frombuffer(array.buffers()[1], np.uint8)[first // 8 : -(-after // 8)]
    return np.unpackbits(packed, bitorder="little")[first % 8 :][: len(array)].view(bool)


def _concatenate(parts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *parts])
