"""Which rows may be near duplicates: those that have the hash of a band in common with another row."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from firefly_lightning.preparation.cleaning.signed_rows import BAND, SignedRows
from firefly_lightning.processes import usable_cores


class Buckets:
    """The rows that share a bucket, the hash of a band, with other rows, and which of them have been kept.

    Rows that share none with any other take no memory here.

    Args:
        rows: The rows.

    Attributes:
        shares: Whether each row shares a bucket with another.
    """

    def __init__(self, rows: SignedRows) -> None:
        sound = rows.sound()
        numbers = np.flatnonzero(sound).astype(np.uint32)
        with ThreadPoolExecutor(usable_cores()) as pool:  # sorting leaves Python to other threads
            shared = list(pool.map(lambda name: _shared(rows.column(name)[sound], numbers), BAND))
        self._members = np.concatenate([members for members, _ in shared])
        sizes = np.concatenate([sizes for _, sizes in shared])
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else sizes
        self._kept = np.zeros(len(sizes), np.uint32)
        bucket = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
        self._buckets = bucket[np.argsort(self._members, kind="stable")]
        counts = np.bincount(self._members, minlength=len(sound))
        self._ends = np.cumsum(counts)
        self.shares = counts > 0

    def kept_beside(self, row: int) -> list[int]:
        """Rows kept so far that share a bucket with a row, in order."""
        found: set[int] = set()
        for bucket in self._of(row):
            start = self._starts[bucket]
            found.update(self._members[start : start + self._kept[bucket]].tolist())
        return sorted(found)

    def keep(self, row: int) -> None:
        """Says that a row has been kept; no row may be kept before one that comes earlier."""
        for bucket in self._of(row):
            # The kept members of a bucket take the places of the first ones, all of which have been decided on.
            self._members[self._starts[bucket] + self._kept[bucket]] = row
            self._kept[bucket] += 1

    def _of(self, row: int) -> NDArray[np.uint32]:
        return self._buckets[self._ends[row - 1] if row else 0 : self._ends[row]]


def _shared(hashes: NDArray[np.uint64], numbers: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The members of all buckets of a band with more than one, bucket by bucket, and how many each has."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.empty(0, int)
    sizes = np.diff(np.append(starts, len(hashes)))
    several = np.repeat(sizes > 1, sizes)
    return numbers[order[several]], sizes[sizes > 1]
