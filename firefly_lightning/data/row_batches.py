"""Rows with the token ids of their texts as batches of an Arrow file: joined, cut or windowed, and counted by kind."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from firefly_lightning.data.row_arrays import RowArrays, TooLong, cut_rows, join_rows
from firefly_lightning.data.sources.row_forms import Row
from firefly_lightning.data.tokenized_rows import COUNTED, NO_WINDOW
from firefly_lightning.data.windows import document_windows
from firefly_lightning.prompt import PromptEncoder

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "target_mask": pa.list_(pa.bool_()),
        "target_tokens": pa.int32(),
        "kind": pa.int32(),
        "number": pa.int64(),
        "identity": pa.uint64(),
        "window": pa.int32(),
    }
)


class Cut(NamedTuple):
    """What becomes of long rows.

    Attributes:
        max_length: Most tokens of a row that is kept.
        too_long: What is done with an instruction row that has more.
        stride: Tokens that two windows of a document that has more share.
    """

    max_length: int
    too_long: TooLong
    stride: int = 1


class RowBatches:
    """Makes batches of rows.

    Args:
        encoder: Has the control tokens to put around texts.
        cut: What becomes of long rows.
        together: Rows of a record, which are kept, left out and counted as one.

    Attributes:
        counts: The numbers that ``COUNTED`` names of the rows so far, by kind; kinds in the order of their numbers.
    """

    def __init__(self, encoder: PromptEncoder, cut: Cut, together: int = 1) -> None:
        self._encoder, self._cut, self._together = encoder, cut, together
        self.counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTED, 0))

    def made_of(self, rows: Sequence[Row], texts: Sequence[Sequence[int]]) -> Iterator[pa.RecordBatch]:
        """A batch of the instruction rows among some rows, and one of the windows of the documents among them.

        Args:
            rows: The rows.
            texts: Token ids of the input and the target of every turn of every row, in order.
        """
        ends = np.cumsum([2 * len(row.turns) for row in rows])
        for make, documents in ((self._instructions, False), (self._windows, True)):
            of_these = [(row, end) for row, end in zip(rows, ends.tolist(), strict=True) if row.document is documents]
            if of_these:
                taken = [row for row, _ in of_these]
                yield make(taken, [ids for row, end in of_these for ids in texts[end - 2 * len(row.turns) : end]])

    def _instructions(self, rows: Sequence[Row], texts: Sequence[Sequence[int]]) -> pa.RecordBatch:
        """Instruction rows as they will be learned, without those of which nothing can be learned."""
        max_length, too_long, _ = self._cut
        controls = self._encoder.controls
        whole = join_rows(texts, [len(row.turns) for row in rows], controls, _learned(rows))
        kinds = self._count(rows)
        longer = self._of_any(whole.lengths > max_length)
        dropped = longer & (too_long == "drop")
        cut = cut_rows(whole.only(~dropped), max_length, too_long, len(controls.start))
        at, each = np.flatnonzero(~dropped), self._together
        taught = ~self._of_any((cut.target_tokens == 0) | self._alike(cut, longer[at]))
        self._add("dropped", kinds[dropped][::each])
        self._add("truncated", kinds[longer & ~dropped][::each])
        self._add("no_target", kinds[at[~taught]][::each])
        kept, at = cut.only(taught), at[taught]
        return self._batch(kept, kinds[at], [rows[index] for index in at.tolist()], np.full(len(at), NO_WINDOW))

    def _windows(self, rows: Sequence[Row], texts: Sequence[Sequence[int]]) -> pa.RecordBatch:
        """The windows of documents; with room for one token nothing can be learned."""
        bos, eos = self._encoder.bos_token_id, self._encoder.eos_token_id
        windows = document_windows(texts[1::2], bos, eos, self._cut.max_length, self._cut.stride)
        kinds = self._count(rows)[windows.documents]
        taught = windows.rows.target_tokens > 0
        self._add("windows", kinds)
        self._add("no_target", kinds[~taught])
        of = [rows[index] for index in windows.documents[taught].tolist()]
        return self._batch(windows.rows.only(taught), kinds[taught], of, windows.numbers[taught])

    def _count(self, rows: Sequence[Row]) -> npt.NDArray[np.int32]:
        """(rows,) the number of each row's kind; counts them."""
        for row in rows[:: self._together]:
            self.counts[row.kind]["rows"] += 1
            self.counts[row.kind]["unanswered"] += row.unanswered
        numbers = {kind: number for number, kind in enumerate(self.counts)}
        return np.array([numbers[row.kind] for row in rows], np.int32)

    def _of_any(self, flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(rows,) whether it is true of any row of the same record."""
        return np.repeat(flags.reshape(-1, self._together).any(1), self._together)

    def _alike(self, cut: RowArrays, shorter: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(rows,) whether all rows of a record are the same, as they may be once cut; then nothing differs."""
        found, each = np.zeros(len(shorter), bool), self._together
        if each > 1:
            offsets = cut.offsets
            for first in np.flatnonzero(shorter)[::each].tolist():
                one, *others = (cut.input_ids[offsets[row] : offsets[row + 1]] for row in range(first, first + each))
                found[first : first + each] = all(np.array_equal(one, other) for other in others)
        return found

    def _add(self, name: str, kinds: npt.NDArray[np.int32], amounts: npt.NDArray[np.integer] | None = None) -> None:
        for kind, amount in zip(self.counts, np.bincount(kinds, amounts, len(self.counts)), strict=True):
            self.counts[kind][name] += int(amount)

    def _batch(
        self, kept: RowArrays, kinds: npt.NDArray[np.int32], rows: Sequence[Row], windows: npt.NDArray[np.int64]
    ) -> pa.RecordBatch:
        self._add("tokens", kinds, kept.lengths)
        self._add("target_tokens", kinds, kept.target_tokens)
        offsets = kept.offsets.astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(kept.input_ids)),
            pa.ListArray.from_arrays(offsets, pa.array(kept.target_mask)),
            pa.array(kept.target_tokens),
            pa.array(kinds),
            pa.array([row.number for row in rows], pa.int64()),
            pa.array([row.identity for row in rows], pa.uint64()),
            pa.array(windows.astype(np.int32)),
        ]
        return pa.record_batch(columns, schema=SCHEMA)


def _learned(rows: Sequence[Row]) -> npt.NDArray[np.bool_] | None:
    """(turns,) whether the target of each turn of the rows is learned; None where all are."""
    if not any(row.learned for row in rows):
        return None
    return np.array([one for row in rows for one in row.learned or (True,) * len(row.turns)])
