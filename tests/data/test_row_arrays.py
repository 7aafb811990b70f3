"""Rows as arrays are what a loop over rows gives, for every format and policy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning.data.row_arrays import cut_rows, join_rows
from firefly_lightning.prompt import PRESETS, PromptEncoder, PromptFormat

FORMATS = [*PRESETS.values(), PromptFormat(start="", separator="</s>问</s>", later_separator="</s></s>")]
TEXTS = st.sampled_from(["", "好", "春风又绿江南岸", "hello </s> world", "\n"])
ROWS = st.lists(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    return [PromptEncoder(tokenizer, prompt) for prompt in FORMATS]


def arrays(encoder, rows):
    texts = encoder.encode_texts([text for turns in rows for turn in turns for text in turn])
    return join_rows(texts, [len(turns) for turns in rows], encoder.controls)


def as_lists(joined):
    ends = list(itertools.accumulate(joined.lengths.tolist(), initial=0))
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    assert ends[-1] == len(joined.input_ids) == len(joined.target_mask)
    return [(joined.input_ids[part].tolist(), joined.target_mask[part].tolist()) for part in parts]


@pytest.mark.parametrize("index", range(len(FORMATS)))
@given(rows=ROWS)
def test_rows_are_joined_as_one_by_one(encoders, index, rows):
    joined = arrays(encoders[index], rows)
    expected = [tuple(row) for row in encoders[index].encode(rows)]
    assert as_lists(joined) == expected
    assert joined.target_tokens.tolist() == [sum(mask) for _, mask in expected]
    assert joined.input_ids.dtype == joined.target_tokens.dtype == np.int32


def cut(values, max_length, policy, start):
    """A row's values under a policy, or None where the row is left out."""
    if len(values) <= max_length:
        return values
    from_end = values[:start] + values[len(values) - max_length + start :]
    return {"truncate": values[:max_length], "truncate_keep_end": from_end}.get(policy)


@pytest.mark.parametrize("policy", ["truncate", "truncate_keep_end", "drop"])
@given(rows=ROWS, max_length=st.integers(1, 30))
def test_rows_are_cut_as_one_by_one(encoders, policy, rows, max_length):
    joined = arrays(encoders[0], rows)
    expected = [[cut(values, max_length, policy, 1) for values in row] for row in as_lists(joined)]
    assert as_lists(cut_rows(joined, max_length, policy, 1)) == [tuple(row) for row in expected if row[0] is not None]
