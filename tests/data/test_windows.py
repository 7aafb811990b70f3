"""Windows of documents are what a loop over their tokens gives: every token is learned once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning.data.windows import document_windows

START, END = 1, 2
TEXTS = st.lists(st.lists(st.integers(10, 99), max_size=40), min_size=1, max_size=5)


def one_by_one(text, max_length, stride):
    """(ids, learned) of each window of one document."""
    whole = [START, *text, END]
    found = [(whole[:max_length], [False, *[True] * (len(whole[:max_length]) - 1)])]
    done = max_length
    while done < len(whole):
        new = whole[done : done + max_length - stride]
        found.append((whole[done - stride : done] + new, [False] * stride + [True] * len(new)))
        done += len(new)
    return found


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 100, 2**63 - 1])
@pytest.mark.parametrize("stride", [1, 2, 7])
@given(texts=TEXTS)
def test_windows_are_those_of_a_loop(max_length, stride, texts):
    windows = document_windows(texts, START, END, max_length, stride)
    shared = min(stride, max_length - 1)
    expected = [
        (document, number, *window)
        for document, text in enumerate(texts)
        for number, window in enumerate(one_by_one(text, max_length, shared))
    ]
    parts = np.split(np.arange(len(windows.rows.input_ids)), windows.rows.offsets[1:-1])
    found = [
        (document, number, windows.rows.input_ids[part].tolist(), windows.rows.target_mask[part].tolist())
        for document, number, part in zip(windows.documents.tolist(), windows.numbers.tolist(), parts, strict=True)
    ]
    assert found == expected
    for document, text in enumerate(texts):
        taught = [
            token
            for of, _, ids, mask in found
            for token, learned in zip(ids, mask, strict=True)
            if of == document and learned
        ]
        assert taught == [*text, END]


@given(texts=TEXTS)
def test_with_room_for_one_token_nothing_is_learned(texts):
    windows = document_windows(texts, START, END, 1, 1)
    assert not windows.rows.target_mask.any()
    assert windows.rows.lengths.tolist() == [1] * sum(len(text) + 2 for text in texts)
