"""Which rows make optimizer step k.

Everything here is a pure function of its arguments: no generator is advanced, nothing is remembered between steps. A
run can therefore stop, resume, and move to another number of devices at any step and meet the same rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from firefly_lightning.errors import FireflyError

Rows = npt.NDArray[np.int64]


class WeightedRows(NamedTuple):
    """Rows of one source and how often they are taken.

    Attributes:
        rows: Numbers of the rows.
        weight: How often an epoch takes each row: 1 is once, 0.5 is half of the rows, 2 is twice.
        epochs: How often each row is taken at most, over all epochs.
    """

    rows: Rows
    weight: float = 1.0
    epochs: float = math.inf


class StepPlan:
    """The rows of every optimizer step.

    An epoch takes each row of a source ``weight`` times; with a fraction, later epochs go on where earlier ones ended,
    so that no row is taken again before all others. Where a source has been taken ``epochs`` times, other sources fill
    its place, in proportion. The last step of an epoch may have fewer than ``batch_size`` rows.

    Args:
        lengths: (rows,) number of tokens of each row.
        target_tokens: (rows,) number of learned tokens of each row.
        sources: Which of the rows to take, and how often.
        batch_size: Rows in one optimizer step, over all devices.
        seed: Seed of the order in which rows come.
        shuffle: If false, rows come in the order of ``sources``, in every epoch.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        target_tokens: npt.NDArray[np.integer],
        sources: Sequence[WeightedRows],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.lengths = lengths
        self.sources = list(sources)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._target_tokens = target_tokens
        # A source of three rows and a weight of 0.1 still gives one: a source is never silently left out.
        quotas = [max(1, round(source.weight * len(source.rows))) for source in self.sources]
        self._limits = [
            math.inf if source.epochs == math.inf else max(1, int(source.epochs * len(source.rows)))
            for source in self.sources
        ]
        self._quotas = [int(min(pair)) for pair in zip(quotas, self._limits, strict=True)]
        self._taken = [[0] * len(self.sources)]  # rows of each source before each epoch, as far as asked for
        self.rows_per_epoch = sum(self._quotas)
        self.steps_per_epoch = -(-self.rows_per_epoch // batch_size)
        self._orders: dict[int, Rows] = {}

    def rows(self, step: int) -> Rows:
        """Numbers of the rows of an optimizer step, at most ``batch_size`` of them."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def target_tokens(self, step: int) -> int:
        """Number of learned tokens of an optimizer step, over all its rows."""
        return int(self._target_tokens[self.rows(step)].sum())

    def repeated(self, steps: int) -> "StepPlan":
        """A plan whose every epoch takes the rows of the first steps of this one again, step by step."""
        rows = np.concatenate([self.rows(step) for step in range(steps)])
        return StepPlan(
            self.lengths, self._target_tokens, [WeightedRows(rows)], self.batch_size, self.seed, shuffle=False
        )

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies the plan: two plans with equal fingerprints give equal rows at every step."""
        digest = xxhash.xxh3_128()
        for array in (self.lengths, self._target_tokens, *(source.rows for source in self.sources)):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        digest.update(np.array([source.weight for source in self.sources]).tobytes())
        if any(source.epochs < math.inf for source in self.sources):
            digest.update(np.array([source.epochs for source in self.sources]).tobytes())
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "rows_per_epoch": self.rows_per_epoch,
            "row_lengths": digest.hexdigest(),
        }

    def check_same(self, saved: Mapping[str, int | str]) -> None:
        """Checks that a plan is the one whose fingerprint was saved.

        Raises:
            FireflyError: If it is another.
        """
        now = self.fingerprint()
        if changed := [f"{name} {saved.get(name)} → {now[name]}" for name in now if saved.get(name) != now[name]]:
            raise FireflyError(
                f"the checkpoint was saved with other data ({', '.join(changed)}); "
                "resume with the same rows, data.seed and data.batch_size, or train the exported model anew"
            )

    def _epoch(self, epoch: int) -> Rows:
        # Steps are asked for in order, each by several callers; at a boundary both epochs are needed.
        if epoch not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if abs(kept - epoch) == 1}
            self._orders[epoch] = self._order(epoch)
        return self._orders[epoch]

    def _order(self, epoch: int) -> Rows:
        parts = [self._take(index, epoch) for index in range(len(self.sources))]
        rows = np.concatenate(parts)
        return rows[permutation(len(rows), self.seed, len(parts), epoch)] if self.shuffle else rows

    def _take(self, index: int, epoch: int) -> Rows:
        """Rows of one source in one epoch: a window that slides over the source's permutations laid end to end."""
        rows = self.sources[index].rows
        first, end = (
            (self._before(at)[index] for at in (epoch, epoch + 1)) if self.shuffle else (0, self._quotas[index])
        )
        parts, whole = [rows[:0]], len(rows)
        for number in range(first // whole, -(-end // whole)):
            order = permutation(whole, self.seed, index, number) if self.shuffle else np.arange(whole)
            parts.append(rows[order[max(first - number * whole, 0) : end - number * whole]])
        return np.concatenate(parts)

    def check_lasts(self, steps: int) -> None:
        """Checks that there are rows for a number of optimizer steps.

        Raises:
            FireflyError: If every source has been taken as often as its ``epochs`` allow before the last step.
        """
        self._before(-(-steps // self.steps_per_epoch))

    def _before(self, epoch: int) -> list[int]:
        """For each source, how many rows the epochs before the given one take."""
        while len(self._taken) <= epoch:
            taken = self._taken[-1]
            more = self._fill([limit - count for limit, count in zip(self._limits, taken, strict=True)])
            self._taken.append([count + added for count, added in zip(taken, more, strict=True)])
        return self._taken[epoch]

    def _fill(self, left: Sequence[float]) -> list[int]:
        """For each source, how many rows an epoch takes where only ``left`` rows may still be taken of each."""
        quotas = [int(min(pair)) for pair in zip(self._quotas, left, strict=True)]
        while missing := self.rows_per_epoch - sum(quotas):
            open_ = [index for index in range(len(quotas)) if quotas[index] < left[index]]
            if not open_:
                raise FireflyError(
                    f"data.train_files: every source has been taken as often as its epochs allow after "
                    f"{len(self._taken) - 1} epochs of the run; raise them, or train for fewer steps"
                )
            more = apportion(missing, [self._quotas[index] for index in open_])
            for index, added in zip(open_, more, strict=True):
                quotas[index] = int(min(quotas[index] + added, left[index]))
        return quotas


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Splits a total in proportion to sizes; what rounding down leaves goes to the parts of largest remainders."""
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(total * sizes[index] % whole), index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def permutation(n: int, *key: int) -> Rows:
    """A permutation of ``range(n)`` that depends on the key alone, on every machine and NumPy release.

    Rows are sorted by a hash, SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014), because NumPy does not promise that its generators keep their streams.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _splitmix64(state + np.array([part % 2**64], np.uint64))
    # No two hashes are equal, since SplitMix64 is a bijection: all ways to sort agree, and the default is the fastest.
    return np.argsort(_splitmix64(state + np.arange(n).astype(np.uint64)))


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
