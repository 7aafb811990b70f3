"""Compares the texts of rows, which are read from the files of their portions."""

import os
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from firefly_lightning.preparation.cleaning.pieces import jaccard, shingles
from firefly_lightning.preparation.cleaning.signed_rows import SignedRows

Pair = tuple[int, int]
"""A row, and an earlier one that it may be like."""

Pieces = tuple[set[bytes], set[bytes]]
"""The shingles of a row's whole text, and those of its targets."""


class Place(NamedTuple):
    """Where the texts of a row are: in the file of a portion, from a first byte, so many of both and of the targets."""

    portion: int
    start: int
    size: int
    target_size: int


class Comparison(NamedTuple):
    """Pairs of a portion of rows, with the places of all that are in them."""

    portion: int
    pairs: Sequence[Pair]
    places: dict[int, Place]


class ComparedTexts:
    """Where the texts of all rows are.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: SignedRows) -> None:
        self._place = rows.place
        self._ends = array("Q", rows.column("texts_end").astype(np.uint64).tobytes())
        self._target_sizes = array("I", rows.column("target_size").astype(np.uint32).tobytes())

    def comparison(self, portion: int, pairs: Sequence[Pair]) -> Comparison:
        """Pairs with what it takes to compare them in another process."""
        return Comparison(portion, pairs, {row: self._find(row) for row in {one for pair in pairs for one in pair}})

    def _find(self, row: int) -> Place:
        portion, within = self._place(row)
        start = self._ends[row - 1] if within else 0
        return Place(portion, start, self._ends[row] - start, self._target_sizes[row])


class Comparer:
    """Compares pairs of rows; this object can be sent to another process.

    Two rows are near duplicates if both their whole texts and their targets are alike: two questions about one long
    passage are no near duplicates.

    Args:
        tables: The tables of all portions.
        threshold: Jaccard similarity from which on two texts are alike.
    """

    def __init__(self, tables: Sequence[Path], threshold: float) -> None:
        self.files, self.threshold = [str(table.with_suffix(".texts")) for table in tables], threshold

    def __call__(self, comparison: Comparison) -> tuple[int, dict[Pair, float]]:
        """The portion, and the similarity of each of its pairs, 0 for those that are not alike."""
        portion, pairs, places = comparison
        pieces = lru_cache(1024)(lambda row: self._pieces(places[row]))
        return portion, {(row, other): self._compare(pieces(row), pieces(other)) for row, other in pairs}

    def _compare(self, one: Pieces, two: Pieces) -> float:
        (whole, target), (other_whole, other_target) = one, two
        similarity = jaccard(whole, other_whole)
        alike = similarity >= self.threshold and jaccard(target, other_target) >= self.threshold
        return similarity if alike else 0

    def _pieces(self, place: Place) -> Pieces:
        both = os.pread(opened(self.files[place.portion]).fileno(), place.size, place.start)
        middle = place.size - place.target_size
        return shingles(both[:middle]), shingles(both[middle:])


@lru_cache(256)
def opened(path: str) -> BinaryIO:
    """A file of texts, opened once for many rows; ``opened.cache_clear()`` closes all."""
    return Path(path).open("rb")
