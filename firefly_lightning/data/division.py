"""How ranks and micro-batches share the rows of an optimizer step, whatever their numbers.

Ranks get as many tokens as can be, not as many rows. What they compute is summed, so who has which row changes nothing
but the order of sums.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from firefly_lightning.data.plan import Rows, StepPlan
from firefly_lightning.errors import FireflyError

LOOKED_AT = 100_000
"""Steps that are looked at, at most, for the number of micro-batches that a limit of tokens needs; some seconds."""


class Division(NamedTuple):
    """How every step of a run is shared.

    Attributes:
        ranks: Ranks that share a step.
        micro_batches: Micro-batches that every rank takes for a step; some may hold no rows.
        rows: Rows that a rank works on at a time, at most.
        tokens: Tokens that a rank works on at a time, at most; None for any number.
    """

    ranks: int
    micro_batches: int
    rows: int
    tokens: int | None = None

    def shared(self, rows: Rows, lengths: npt.NDArray[np.integer]) -> list[list[Rows]]:
        """For each rank, the rows of its micro-batches in order.

        Rows of like length share a micro-batch. The longest come first, so that memory runs out at once or never.

        Args:
            rows: The rows of a step.
            lengths: Number of tokens of every row of the data.
        """
        longest_first = rows[np.lexsort((rows, -lengths[rows]))]
        tokens = lengths[longest_first].tolist()
        ranks = _balanced(tokens, self.ranks, self.micro_batches * self.rows)
        return [[longest_first[part] for part in self._parts(places, tokens)] for places in ranks]

    def needs(self, rows: Rows, lengths: npt.NDArray[np.integer]) -> int:
        """The micro-batches that a rank needs at most for a step; those of this division are not looked at."""
        tokens = sorted(lengths[rows].tolist(), reverse=True)
        ranks = _balanced(tokens, self.ranks, len(tokens))
        return max(len(_filled(places, tokens, self.rows, self.tokens or sum(tokens))) for places in ranks)

    def _parts(self, places: Sequence[int], tokens: Sequence[int]) -> list[Sequence[int]]:
        """A rank's rows in micro-batches of which the heaviest has as few tokens as can be."""
        least, most = max((tokens[place] for place in places), default=0), sum(tokens[place] for place in places)
        while least < most:
            middle = (least + most) // 2
            if len(_filled(places, tokens, self.rows, middle)) > self.micro_batches:
                least = middle + 1
            else:
                most = middle
        parts = _filled(places, tokens, self.rows, least)
        return parts + [[]] * (self.micro_batches - len(parts))


def division_of(plan: StepPlan, ranks: int, rows: int | None, tokens: int | None, steps: float) -> Division:
    """How the steps of a training are shared, with as few micro-batches as the limits allow.

    Args:
        plan: The rows of every step.
        ranks: Ranks that share a step.
        rows: Rows that a rank works on at a time, at most; None for all of its share, or as many as ``tokens`` allow.
        tokens: Tokens that a rank works on at a time, at most; None for any number.
        steps: Steps of the run. Where there is a limit of tokens, :data:`LOOKED_AT` of them at most are looked at; a
            later step that needed more micro-batches would have them a little above the limit instead.

    Raises:
        FireflyError: If a row has more tokens than the limit.
    """
    share = -(-plan.batch_size // ranks)
    if tokens is None:
        rows = min(rows or share, share)
        return Division(ranks, -(-share // rows), rows)
    longest = max(int(plan.lengths[source.rows].max(initial=0)) for source in plan.sources)
    if longest > tokens:
        raise FireflyError(
            f"data.micro_batch_tokens {tokens} is less than the {longest} tokens of the longest row; "
            "raise it, or lower data.max_length"
        )
    rows = rows or plan.batch_size
    division = Division(ranks, -(-share // rows), rows, tokens)
    looked_at = tqdm(range(int(min(steps, LOOKED_AT))), desc="micro-batches", unit=" steps", delay=2)
    needed = (division.needs(plan.rows(step), plan.lengths) for step in looked_at)
    return division._replace(micro_batches=max(division.micro_batches, *needed))


def one_each(batch_size: int, ranks: int, rows: int | None, tokens: int | None, longest: int) -> Division:
    """A division with one micro-batch a step and rank, for an evaluation: no gradients of several are added up.

    Args:
        batch_size: Rows of a step of training.
        ranks: Ranks that share the rows.
        rows: Rows that a rank works on at a time, at most; None for its share of a step of training.
        tokens: Tokens that a rank works on at a time, at most, padding included; None for any number.
        longest: Tokens of the longest row.
    """
    share = -(-batch_size // ranks)
    fitting = max(1, tokens // max(longest, 1)) if tokens else share
    return Division(ranks, 1, min(rows or share, share, fitting))


def _balanced(tokens: Sequence[int], ranks: int, most: int) -> list[list[int]]:
    """For each rank, the places of its rows: each row, longest first, goes to the rank with the fewest tokens so far.

    That is Graham's rule, "Bounds on multiprocessing timing anomalies" (1969), with a limit.

    Args:
        tokens: Tokens of each row, the longest first.
        ranks: Number of ranks.
        most: Rows of a rank at most.
    """
    if ranks == 1:
        return [list(range(len(tokens)))]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    queue = [(0, rank) for rank in range(ranks)]
    for place, count in enumerate(tokens):
        taken, rank = queue[0]
        shares[rank].append(place)
        if len(shares[rank]) < most:
            heapq.heapreplace(queue, (taken + count, rank))
        else:
            heapq.heappop(queue)
    return shares


def _filled(places: Sequence[int], tokens: Sequence[int], most_rows: int, most_tokens: int) -> list[Sequence[int]]:
    """Parts of some rows in order, each with as many as the limits allow; a row alone may be above that of tokens."""
    parts, begin, taken = [], 0, 0
    for end, place in enumerate(places):
        if end - begin == most_rows or (taken + tokens[place] > most_tokens and end > begin):
            parts.append(places[begin:end])
            begin, taken = end, 0
        taken += tokens[place]
    return [*parts, places[begin:]] if places else []
