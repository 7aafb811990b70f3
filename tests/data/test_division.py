"""Ranks and micro-batches share a step whatever their numbers: each row once, within the limits, tokens balanced."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning import FireflyDataModule
from firefly_lightning.data.division import Division, division_of, one_each
from firefly_lightning.data.plan import StepPlan, WeightedRows
from firefly_lightning.errors import FireflyError


def make_plan(lengths, batch_size: int) -> StepPlan:
    lengths = np.asarray(lengths)
    return StepPlan(lengths, lengths // 2, [WeightedRows(np.arange(len(lengths)))], batch_size)


LENGTHS = st.lists(st.integers(2, 512), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 24), st.integers(1, 9), st.none() | st.integers(1, 9))
def test_each_row_once_whatever_the_numbers(lengths, batch_size, ranks, rows):
    plan = make_plan(lengths, batch_size)
    division = division_of(plan, ranks, rows, None, plan.steps_per_epoch)
    assert division.rows <= (rows or batch_size)
    # No fewer micro-batches of so many rows hold a whole step.
    assert (division.micro_batches - 1) * division.rows * ranks < batch_size
    for step in range(plan.steps_per_epoch):
        shared = division.shared(plan.rows(step), plan.lengths)
        assert [len(rank) for rank in shared] == [division.micro_batches] * ranks
        assert all(len(part) <= division.rows for rank in shared for part in rank)
        assert sorted(np.concatenate([part for rank in shared for part in rank])) == sorted(plan.rows(step))


@given(LENGTHS, st.integers(1, 24), st.integers(1, 5), st.integers(512, 4096), st.none() | st.integers(1, 9))
def test_no_micro_batch_has_more_tokens_than_the_limit(lengths, batch_size, ranks, tokens, rows):
    plan = make_plan(lengths, batch_size)
    division = division_of(plan, ranks, rows, tokens, 3 * plan.steps_per_epoch)
    needed = []
    for step in range(3 * plan.steps_per_epoch):
        shared = division.shared(plan.rows(step), plan.lengths)
        assert sorted(np.concatenate([part for rank in shared for part in rank])) == sorted(plan.rows(step))
        assert all(plan.lengths[part].sum() <= tokens for rank in shared for part in rank)
        assert all(len(part) <= (rows or batch_size) for rank in shared for part in rank)
        needed.append(division.needs(plan.rows(step), plan.lengths))
    of_rows = math.ceil(math.ceil(batch_size / ranks) / (rows or batch_size))
    assert division.micro_batches == max(of_rows, *needed), "as few as the heaviest step allows"


def test_rows_of_like_length_share_a_micro_batch_and_the_longest_come_first():
    lengths = np.random.default_rng(0).integers(4, 500, 400)
    plan = make_plan(lengths, 16)
    for ranks, rows in ((1, 4), (1, 3), (3, 2)):
        division = division_of(plan, ranks, rows, None, 0)
        for step in range(plan.steps_per_epoch):
            for rank in division.shared(plan.rows(step), lengths):
                taken = lengths[np.concatenate(rank)]
                assert (np.diff(taken) <= 0).all()


def test_micro_batches_that_need_not_be_full_have_like_numbers_of_tokens():
    division = Division(ranks=1, micro_batches=2, rows=5)
    lengths = np.array([100, 10, 10, 10, 10, 10, 10])
    assert [part.tolist() for part in division.shared(np.arange(7), lengths)[0]] == [[0, 1], [2, 3, 4, 5, 6]]


def test_ranks_get_like_numbers_of_tokens_of_real_rows(model_folder, rows_file, tmp_path):
    data = FireflyDataModule(str(model_folder), str(rows_file), cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    lengths = np.tile(data.train.rows.lengths, 20)
    for ranks in range(2, 9):
        for rows in (None, 4):
            plan = make_plan(lengths, 16 * ranks)
            division = division_of(plan, ranks, rows, None, 0)
            for step in range(plan.steps_per_epoch - 1):
                shared = division.shared(plan.rows(step), lengths)
                tokens = np.array([sum(lengths[part].sum() for part in rank) for rank in shared])
                assert tokens.max() / tokens.mean() <= 1.05


def test_more_ranks_than_rows_and_a_short_last_step():
    division = division_of(make_plan([7, 7, 7, 9, 8], 16), 3, 3, None, 1)
    assert (division.micro_batches, division.rows) == (2, 3)
    shared = division.shared(np.arange(5), np.array([7, 7, 7, 9, 8]))
    assert [[part.tolist() for part in rank] for rank in shared] == [[[3], []], [[4], [2]], [[0], [1]]]
    shared = division_of(make_plan([5], 1), 3, None, None, 1).shared(np.arange(1), np.array([5]))
    assert [[part.tolist() for part in rank] for rank in shared] == [[[0]], [[]], [[]]]


def test_an_evaluation_has_one_micro_batch_a_step_within_the_limits():
    assert one_each(16, 3, None, None, 512) == Division(3, 1, 6)
    assert one_each(16, 3, 4, None, 512) == Division(3, 1, 4)
    assert one_each(16, 1, None, 1024, 300) == Division(1, 1, 3)
    assert one_each(16, 1, None, 100, 300) == Division(1, 1, 1), "a row that is longer is taken alone"


def test_a_row_that_is_longer_than_a_micro_batch_may_be():
    says = "data.micro_batch_tokens 100 is less than the 120 tokens of the longest row; raise it, or lower data.max_len"
    with pytest.raises(FireflyError, match=says):
        division_of(make_plan([30, 120, 50], 2), 1, None, 100, 3)


def test_a_step_that_was_not_looked_at_has_every_row_too(monkeypatch):
    monkeypatch.setattr("firefly_lightning.data.division.LOOKED_AT", 1)
    plan = make_plan([10, 12, 90, 80], 2)
    order = sorted(range(2), key=lambda step: plan.lengths[plan.rows(step)].sum())
    division = division_of(plan, 1, None, 100, float("inf"))
    for step in order:
        (shared,) = division.shared(plan.rows(step), plan.lengths)
        assert sorted(np.concatenate(shared)) == sorted(plan.rows(step))
        assert len(shared) == division.micro_batches
