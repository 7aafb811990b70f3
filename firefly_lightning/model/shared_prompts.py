"""Pairs of rows that begin alike: the common beginning is computed once, and each ending sees it and itself alone.

A pair lies as ``beginning, ending of the first row, ending of the second row``. All layers but attention work on each
token by itself, so that they do not see the difference; attention and ALiBi go by the place of a token in its own row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firefly_lightning.model.attention import AlibiBias, Scores, kept_as


class Span(NamedTuple):
    """Number of tokens of the parts of a pair: the common beginning, and the two endings; one of them may be empty."""

    shared: int
    first: int
    second: int


class SharedPrompts(NamedTuple):
    """How pairs lie when they share their beginnings; a :class:`firefly_lightning.model.attention.Packing`.

    Attributes:
        spans: The parts of each pair.
        positions: (tokens,) place of each token in the padded, flattened rows (2 · pairs · length), of which the first
            and the second row of a pair follow one another; of the common beginning its place in the first row.
        targets: (targets,) which of the tokens are followed by a learned token of their row; a token of the beginning
            is named for each of the two rows.
        sources: (2 · pairs · length,) which token is at each place of the padded rows; the first one in padding.
    """

    spans: list[Span]
    positions: Tensor
    targets: Tensor
    sources: Tensor

    def one_by_one(self, split: Tensor, bias: AlibiBias, scores: Scores, kept: torch.dtype | None) -> Sequence[Tensor]:
        """The first row of a pair as any row, then the ending of the second with the beginning before it."""
        contexts = []
        for pair, span in zip(torch.split(split, [sum(span) for span in self.spans]), self.spans, strict=True):
            # The gradient of `split` is a single copy; each part (1, heads, its tokens, head_dim) of each of the three.
            parts = [part.permute(2, 1, 0, 3).unsqueeze(1).unbind() for part in torch.split(pair, list(span))]
            shared, first, second = parts
            query, key, value = (torch.cat(both, 2) for both in zip(shared, first, strict=True))
            with kept_as(kept, query, key, value):
                contexts.append(scores(query, key, value, attn_mask=bias(span.shared + span.first, query)))
            if span.second:
                query = second[0]
                key, value = (torch.cat(both, 2) for both in zip(shared[1:], second[1:], strict=True))
                own = bias(span.shared + span.second, query)[..., span.shared :, :]
                with kept_as(kept, query, key, value):
                    contexts.append(scores(query, key, value, attn_mask=own))
        return contexts

    def padded(self, split: Tensor, bias: AlibiBias, scores: Scores) -> Sequence[Tensor]:
        """All rows whole, gathered from the tokens; only attention is computed twice for a beginning.

        Padding follows the last token of a row, so that no query of the row sees it.
        """
        rows = 2 * len(self.spans)
        gathered = split.index_select(0, self.sources).view(rows, -1, *split.shape[1:])
        query, key, value = gathered.permute(3, 0, 2, 1, 4).unbind()
        return [scores(query, key, value, attn_mask=bias(gathered.shape[1], query))]
