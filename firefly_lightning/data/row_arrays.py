"""Many rows as arrays, one after another: what ``PromptEncoder.encode`` gives, without a loop over rows and tokens."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from firefly_lightning.prompt import ControlIds

TooLong = Literal["truncate", "truncate_keep_end", "drop"]
"""What is done with a row of more than ``max_length`` tokens: ``truncate`` keeps its first tokens,
``truncate_keep_end`` its start and its last tokens, ``drop`` leaves it out."""


class RowArrays(NamedTuple):
    """Many rows, one after another.

    Attributes:
        input_ids: (tokens,) token ids of all rows.
        target_mask: (tokens,) which of the tokens are learned.
        lengths: (rows,) number of tokens of each row; no row is empty.
    """

    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(rows + 1,) positions at which each row begins, and the one at which the last row ends."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @property
    def target_tokens(self) -> npt.NDArray[np.int32]:
        """(rows,) number of learned tokens of each row."""
        learned = np.cumsum(self.target_mask, dtype=np.int32)
        return np.diff(np.concatenate([np.zeros(1, np.int32), learned])[self.offsets])

    def tokens_of(self, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(tokens,) which tokens belong to the chosen rows; ``rows`` is (rows,), true for each chosen row."""
        return np.repeat(rows, self.lengths)

    def only(self, rows: npt.NDArray[np.bool_]) -> "RowArrays":
        """The chosen rows alone; ``rows`` is (rows,), true for each chosen row."""
        if rows.all():
            return self
        tokens = self.tokens_of(rows)
        return RowArrays(self.input_ids[tokens], self.target_mask[tokens], self.lengths[rows])


def join_rows(
    texts: Sequence[Sequence[int]],
    turns: Sequence[int],
    controls: ControlIds,
    learned: npt.NDArray[np.bool_] | None = None,
) -> RowArrays:
    """Puts control tokens around the texts of rows.

    Args:
        texts: Token ids of the input and the target of every turn of every row, in order.
        turns: (rows,) how many turns each row has; at least one.
        controls: Control tokens to put around the texts.
        learned: (turns,) whether the target of each turn of the rows is learned; all are where it is None.
    """
    last = 2 * np.cumsum(turns)
    first = last - 2 * np.asarray(turns)  # the number of each row's first text
    target = np.arange(len(texts)) % 2 == 1
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    before = np.zeros_like(sizes)
    before[first] = len(controls.start)
    after = np.where(target, len(controls.end), len(controls.later_separator))
    after[first] = len(controls.separator)
    widths = before + sizes + after
    ends = np.cumsum(widths)
    input_ids = np.empty(int(ends[-1]), np.int32)
    given = np.repeat(np.tile([False, True, False], len(texts)), np.column_stack([before, sizes, after]).reshape(-1))
    input_ids[given] = np.fromiter(itertools.chain.from_iterable(texts), np.int32, int(sizes.sum()))
    later = ~target
    later[first] = False
    for ids, begins in (
        (controls.start, (ends - widths)[first]),
        (controls.separator, (ends - after)[first]),
        (controls.later_separator, (ends - after)[later]),
        (controls.end, (ends - after)[target]),
    ):
        input_ids[begins[:, None] + np.arange(len(ids))] = np.array(ids, np.int32)
    taught = target if learned is None else target & np.repeat(learned, 2)
    return RowArrays(input_ids, np.repeat(taught, widths), np.add.reduceat(widths, first))


def cut_rows(rows: RowArrays, max_length: int, too_long: TooLong, start: int) -> RowArrays:
    """Cuts each row to its first ``max_length`` tokens, or to its start and its last tokens (``truncate_keep_end``).

    Args:
        rows: The rows; those of at most ``max_length`` tokens stay as they are.
        max_length: Number of tokens to keep of a row.
        too_long: What is done with a longer row; ``drop`` leaves it out.
        start: Number of tokens of the format's start, which ``truncate_keep_end`` keeps.
    """
    excess = np.maximum(rows.lengths - max_length, 0)
    if not excess.any():
        return rows
    if too_long == "drop":
        return rows.only(excess == 0)
    place = np.arange(len(rows.input_ids)) - np.repeat(rows.offsets[:-1], rows.lengths)
    if too_long == "truncate":
        kept = place < max_length
    else:
        kept = (place < start) | (place >= start + np.repeat(excess, rows.lengths))
    return RowArrays(rows.input_ids[kept], rows.target_mask[kept], rows.lengths - excess)
