"""Tokenised pairs, and the micro-batches that a preference step receives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from firefly_lightning.data.batches import MicroBatch, PlannedBatches, collate
from firefly_lightning.data.division import one_each
from firefly_lightning.data.plan import Rows, StepPlan, WeightedRows
from firefly_lightning.data.tokenized_rows import TokenizedRow, TokenizedRows
from firefly_lightning.model.shared_prompts import SharedPrompts, Span


class PairBatch(MicroBatch):
    """The pairs that one rank works on at a time.

    What :class:`PaddedRows` has are the two rows of each pair, prompt and answer, one after the other, the chosen one
    first: 2 · pairs rows. ``rows`` and ``kinds`` are those of pairs, and ``step_rows`` counts pairs. A micro-batch of
    no pairs holds two rows of padding.

    Attributes:
        target_rows: (targets,) which of the 2 · pairs rows each target belongs to.
        spans: Tokens of the parts of each pair that are computed where its common beginning is computed once.
        shared_ids: (tokens,) ids of these tokens, one pair after another.
        shared_positions: (tokens,) their places in the padded, flattened rows.
        shared_targets: (targets,) which of these tokens each of ``target_ids`` follows.
        shared_sources: (2 · pairs · length,) which of these tokens is at each place of the padded rows.
    """

    target_rows: Tensor
    spans: list[list[int]]
    shared_ids: Tensor
    shared_positions: Tensor
    shared_targets: Tensor
    shared_sources: Tensor


class TokenizedPair(NamedTuple):
    """The two rows of a pair: prompt and chosen answer, prompt and rejected answer."""

    chosen: TokenizedRow
    rejected: TokenizedRow


class TokenizedPairs(TokenizedRows):
    """Pairs of several cache folders, in which the two rows of a pair follow one another.

    All that :class:`TokenizedRows` says of a row is said of a pair here: ``lengths`` and ``target_tokens`` are the sums
    of its two rows. As a row, a pair is that of its chosen answer.

    Args:
        folders: Cache folders of pairs.
        names: Name of each folder's source in messages.
    """

    def __init__(self, folders: Sequence[Path], names: Sequence[str]) -> None:
        super().__init__(folders, names)
        self.ends = self.ends // 2
        self.lengths = self.lengths[0::2] + self.lengths[1::2]
        self.target_tokens = self.target_tokens[0::2] + self.target_tokens[1::2]
        self.kind_ids, self.windows = self.kind_ids[0::2], self.windows[0::2]
        # Not the same when chosen and rejected are exchanged: that says the opposite.
        self.identities = self.identities[0::2] * np.uint64(3) + self.identities[1::2]

    def __len__(self) -> int:
        return super().__len__() // 2

    def pair(self, number: int) -> TokenizedPair:
        """Both rows of a pair."""
        return TokenizedPair(self.stored(2 * number), self.stored(2 * number + 1))

    def digest(self) -> str:
        """What identifies these pairs in their order: their texts and how many tokens are kept of each."""
        digest = xxhash.xxh3_128()
        for array in (self.identities, self.lengths, self.target_tokens):
            digest.update(np.ascontiguousarray(array, dtype=np.uint64).tobytes())
        return digest.hexdigest()

    def place(self, row: int) -> int:
        """The stored row of a pair's chosen answer."""
        return 2 * row


class PlannedPairs(PlannedBatches):
    """The micro-batches of pairs of one rank; arguments are those of :class:`PlannedBatches`."""

    rows: TokenizedPairs

    def __getitem__(self, index: int) -> PairBatch:
        """The rank's micro-batch ``index`` since the first step of the run."""
        return cast(PairBatch, super().__getitem__(index))

    def collated(self, rows: Rows) -> Any:
        """Pairs, by their numbers, as tensors."""
        return collate_pairs([self.rows.pair(int(row)) for row in rows], self.pad_id)


def each_once(like: PlannedPairs, taken: Rows) -> PlannedPairs:
    """Micro-batches of the size and ranks of others, in which every pair comes once, the longest first.

    Args:
        like: Micro-batches of the same pairs.
        taken: Numbers of the pairs.
    """
    rows, ranks = like.rows, like.division.ranks
    longest = int(rows.lengths[taken].max(initial=0))
    division = one_each(like.plan.batch_size, ranks, like.division.rows, like.division.tokens, longest)
    by_length = WeightedRows(taken[np.argsort(-rows.lengths[taken], kind="stable")])
    plan = StepPlan(rows.lengths, rows.target_tokens, [by_length], division.rows * ranks, shuffle=False)
    return PlannedPairs(rows, plan, division, like.rank, like.pad_id)


def collate_pairs(pairs: Sequence[TokenizedPair], pad_id: int) -> dict[str, Any]:
    """What a :class:`PairBatch` has of its pairs: their rows padded, and the tokens of pairs with a common beginning.

    The beginning is the longest that the ids of both rows have, whatever cut them, and may reach into the answers.
    """
    rows = [row for pair in pairs for row in pair] or [_padding(pad_id)] * 2
    padded = collate(rows, pad_id)
    length = padded["input_ids"].shape[1]
    spans = [_span(*pair) for pair in zip(rows[0::2], rows[1::2], strict=True)]
    sources = np.zeros((len(rows), length), np.int64)
    positions, begin = [], 0
    for number, (shared, first, second) in enumerate(spans):
        place, after = 2 * number * length, begin + shared + first
        sources[2 * number, : shared + first] = np.arange(begin, after)
        sources[2 * number + 1, :shared] = np.arange(begin, begin + shared)
        sources[2 * number + 1, shared : shared + second] = np.arange(after, after + second)
        positions += [place + np.arange(shared + first), place + length + shared + np.arange(second)]
        begin = after + second
    places, target_positions = np.concatenate(positions), padded["target_positions"].numpy()
    return {
        **padded,
        "target_rows": torch.from_numpy(target_positions // length),
        "spans": [list(span) for span in spans],
        "shared_ids": padded["input_ids"].flatten()[torch.from_numpy(places)],
        "shared_positions": torch.from_numpy(places),
        "shared_targets": torch.from_numpy(sources.reshape(-1)[target_positions]),
        "shared_sources": torch.from_numpy(sources.reshape(-1)),
    }


def shared_prompts(batch: PairBatch) -> tuple[Tensor, SharedPrompts]:
    """The tokens of a micro-batch where each common beginning is computed once, and how they lie."""
    spans = [Span(*span) for span in batch["spans"]]
    lying = SharedPrompts(spans, batch["shared_positions"], batch["shared_targets"], batch["shared_sources"])
    return batch["shared_ids"], lying


def chosen_rows(batch: PairBatch) -> MicroBatch:
    """The rows of the chosen answers as a micro-batch of their own, to be answered."""
    chosen = batch["target_rows"] % 2 == 0
    width = batch["input_ids"].shape[1]
    places = batch["target_positions"][chosen]
    rows = {
        "input_ids": batch["input_ids"][0::2],
        "attention_mask": batch["attention_mask"][0::2],
        "target_positions": places - batch["target_rows"][chosen] // 2 * width,
        "target_ids": batch["target_ids"][chosen],
        "lengths": batch["lengths"][0::2],
    }
    return cast(MicroBatch, {**batch, **rows})


def _span(chosen: TokenizedRow, rejected: TokenizedRow) -> Span:
    first, second = chosen.input_ids, rejected.input_ids
    least = min(len(first), len(second))
    apart = np.flatnonzero(first[:least] != second[:least])
    shared = int(apart[0]) if len(apart) else least
    return Span(shared, len(first) - shared, len(second) - shared)


def _padding(pad_id: int) -> TokenizedRow:
    """A row that teaches nothing, since softmax must see a position."""
    return TokenizedRow(np.array([pad_id], np.int32), np.zeros(1, bool))
