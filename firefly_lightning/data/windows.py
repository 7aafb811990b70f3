"""Documents as rows: each is learned as a whole, in as many windows as it needs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from firefly_lightning.data.row_arrays import RowArrays


class Windows(NamedTuple):
    """The windows of many documents, one after another.

    Attributes:
        rows: Their tokens; in each, what the window before has taught is context only.
        documents: (windows,) which of the documents each is of.
        numbers: (windows,) number of each in its document, from 0.
    """

    rows: RowArrays
    documents: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]


def document_windows(texts: Sequence[Sequence[int]], start: int, end: int, max_length: int, stride: int) -> Windows:
    """Documents between a start and an end token, cut into windows that teach each of their tokens once.

    The start token is not learned, as nothing comes before it. Each later window begins with the last ``stride`` tokens
    of the window before, so that its first new token has a context too.

    Args:
        texts: Token ids of the documents.
        start: Id of the token before a document.
        end: Id of the token after it.
        max_length: Most tokens of a window.
        stride: Tokens that two windows share, at least 1; all but one of a window where it has no more.
    """
    sizes = np.fromiter(map(len, texts), np.int64, len(texts)) + 2
    last = np.cumsum(sizes)
    ids = np.empty(int(last[-1]), np.int32)
    is_text = np.ones(len(ids), bool)
    is_text[last - sizes] = is_text[last - 1] = False
    ids[is_text] = np.fromiter((token for text in texts for token in text), np.int32)
    ids[last - sizes], ids[last - 1] = start, end

    shared = min(stride, max_length - 1)
    new = max_length - shared
    counts = 1 + np.maximum(-((max_length - sizes) // new), 0)
    documents = np.repeat(np.arange(len(texts)), counts)
    numbers = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = numbers * new
    lengths = np.minimum(sizes[documents] - first, max_length)
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    taken = np.repeat((last - sizes)[documents] + first, lengths) + place
    learned = place >= np.repeat(np.where(numbers > 0, max(shared, 1), 1), lengths)
    return Windows(RowArrays(ids[taken], learned, lengths), documents, numbers)
