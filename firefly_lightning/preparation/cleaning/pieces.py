"""The pieces (shingles) of texts by which they are compared: as sets for two texts, and as hashes for many at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
"""Number of characters of a piece."""

LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""

SEEDS, COLLAPSE, FACTOR, TURN = (
    (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344)),
    np.uint64(0xA4093822299F31D0),
    np.uint64(0xF1357AEA2E62A9C5),
    26,
)
"""Constants of the hash of ``rustc-hash`` 2, which `rensa` takes for the bytes of a piece."""

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class PieceHashes(NamedTuple):
    """The hashes of the pieces of texts.

    Attributes:
        hashes: Those of the first text, then those of the second, and so on; a piece that is twice in a text is twice
            here.
        ends: Where those of each text begin, and at the end their number; shape (texts + 1,).
    """

    hashes: NDArray[np.uint64]
    ends: NDArray[np.uint64]

    def distinct(self) -> NDArray[np.uint32]:
        """Number of different pieces of each text; shape (texts,).

        The last bits of a hash make room for the number of its text, so that one sorting serves all.
        """
        ends = self.ends.astype(np.int64)
        sizes = ends[1:] - ends[:-1]
        bits = np.uint64(len(sizes).bit_length())
        of_text = np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(64) - bits, sizes)
        keys = np.sort(self.hashes >> bits | of_text)
        new = np.append(True, keys[1:] != keys[:-1])
        texts = (keys[new] >> np.uint64(64) - bits).astype(np.int64)
        return np.bincount(texts, minlength=len(sizes)).astype(np.uint32)


def shingles(text: bytes) -> set[bytes]:
    """All pieces of ``SHINGLE`` characters of a text in UTF-8; a shorter text is one piece."""
    starts = _characters(np.frombuffer(text, np.uint8)).tolist()
    if len(starts) <= SHINGLE:
        return {text}
    starts.append(len(text))
    return {text[start:end] for start, end in zip(starts, starts[SHINGLE:], strict=False)}


def jaccard(one: set[bytes], other: set[bytes]) -> float:
    """The Jaccard similarity of two sets of pieces: those in both sets as a share of those in either."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def piece_hashes(texts: Sequence[bytes]) -> PieceHashes:
    """The hashes of the pieces of each text, as ``rensa.RMinHash.hash_token_sets`` gives them for ``shingles``.

    Args:
        texts: Texts in UTF-8, at least one.
    """
    ends = np.cumsum([len(text) for text in texts])
    size = int(ends[-1])
    content = b"".join([*texts, bytes(SHINGLE * LONGEST_CHARACTER)])  # words are read beyond the last text's end
    starts = _characters(np.frombuffer(content, np.uint8, size))
    characters_end = np.searchsorted(starts, ends)
    characters = np.diff(characters_end, prepend=0)
    pieces = np.maximum(characters - SHINGLE + 1, 1)
    pieces_end = np.append(0, np.cumsum(pieces))
    # Of each piece, which of all characters it begins with; the one piece of an empty text begins where the next does.
    first = np.arange(pieces_end[-1]) + np.repeat(characters_end - characters - pieces_end[:-1], pieces)
    starts = np.append(starts, [size] * (SHINGLE + 1))
    text_ends = np.repeat(ends, pieces)
    begin, end = np.minimum(starts[first], text_ends), np.minimum(starts[first + SHINGLE], text_ends)
    return PieceHashes(_hashes(content, begin, end), pieces_end.astype(np.uint64))


def _characters(content: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where characters begin: at each byte that does not go on with one."""
    return np.flatnonzero((content & 0xC0) != 0x80)


def _hashes(content: bytes, begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hashes of parts of a text, none longer than 20 bytes; bytes of the text follow the last of them."""
    sizes = end - begin
    eight = _words(content, "<u8")
    head, tail = eight[begin], eight[np.maximum(end - 8, 0)]
    if len(short := np.flatnonzero(sizes < 8)):
        four = _words(content, "<u4")
        head[short], tail[short] = four[begin[short]], four[np.maximum(end[short] - 4, 0)]
    if len(short := np.flatnonzero(sizes < 4)):
        one, size = np.frombuffer(content, np.uint8).astype(np.uint64), sizes[short]
        middle, last = begin[short] + size // 2, np.maximum(end[short] - 1, 0)
        head[short] = one[begin[short]] * (size > 0)
        tail[short] = (one[last] << np.uint64(8) | one[middle]) * (size > 0)
    head ^= SEEDS[0]
    tail ^= SEEDS[1]
    if len(long := np.flatnonzero(sizes > 16)):
        mixed = _mixed(SEEDS[0] ^ eight[begin[long]], COLLAPSE ^ eight[begin[long] + 8])
        head[long], tail[long] = SEEDS[1] ^ eight[end[long] - 16], mixed ^ eight[end[long] - 8]
    product = (_mixed(head, tail) ^ sizes.astype(np.uint64)) * FACTOR
    return product << np.uint64(TURN) | product >> np.uint64(64 - TURN)


def _words(content: bytes, kind: str) -> NDArray[np.uint64]:
    """The numbers that begin at each byte."""
    size = np.dtype(kind).itemsize
    return np.ndarray((len(content) - size + 1,), kind, content, strides=(1,))


def _mixed(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The two halves of the products of 128 bits, one upon the other."""
    low, high, other_low, other_high = one & LOW, one >> HALF, other & LOW, other >> HALF
    across = low * other_high
    carried = (low * other_low >> HALF) + (across & LOW) + high * other_low
    mixed: NDArray[np.uint64] = one * other ^ (high * other_high + (across >> HALF) + (carried >> HALF))
    return mixed
