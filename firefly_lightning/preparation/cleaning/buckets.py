"""Which rows may be near duplicates: those that have the hash of a band in common with another row."""

from array import array
from collections.abc import Sequence
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
        members = np.concatenate([members for members, _ in shared])
        sizes = np.concatenate([sizes for _, sizes in shared])
        of_member = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
        counts = np.bincount(members, minlength=len(sound))
        self.shares = array("B", (counts > 0).astype(np.uint8).tobytes())
        # Numbers of arrays of this kind are Python's own, and so are faster to look at one by one.
        self._members = array("I", members.tobytes())
        self._bucket_ends = array("Q", np.cumsum(sizes).astype(np.uint64).tobytes() if len(sizes) else b"")
        self._kept = array("I", bytes(4 * len(sizes)))
        self._buckets = array("I", of_member[np.argsort(members, kind="stable")].tobytes())
        self._ends = array("Q", np.cumsum(counts).astype(np.uint64).tobytes())

    def kept_beside(self, row: int) -> list[int]:
        """Rows kept so far that share a bucket with a row, in order."""
        found: set[int] = set()
        for bucket in self._of(row):
            if kept := self._kept[bucket]:
                start = self._start(bucket)
                found.update(self._members[start : start + kept])
        return sorted(found)

    def keep(self, row: int) -> None:
        """Says that a row has been kept; no row may be kept before one that comes earlier."""
        for bucket in self._of(row):
            # The kept members of a bucket take the places of the first ones, all of which have been decided on.
            self._members[self._start(bucket) + self._kept[bucket]] = row
            self._kept[bucket] += 1

    def _start(self, bucket: int) -> int:
        return self._bucket_ends[bucket - 1] if bucket else 0

    def _of(self, row: int) -> Sequence[int]:
        return self._buckets[self._ends[row - 1] if row else 0 : self._ends[row]]


def _shared(hashes: NDArray[np.uint64], numbers: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The members of all buckets of a band with more than one, bucket by bucket, and how many each has."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.empty(0, int)
    sizes = np.diff(np.append(starts, len(hashes)))
    several = np.repeat(sizes > 1, sizes)
    return numbers[order[several]], sizes[sizes > 1]
