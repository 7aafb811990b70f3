"""The plan is a pure function of lengths, seed and step, the same for every number of devices."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning.data.plan import StepPlan, WeightedRows, apportion, permutation
from firefly_lightning.errors import FireflyError


def make_plan(rows=50, batch_size=8, weights=(1.0,), seed=3, shuffle=True) -> StepPlan:
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 500, rows)
    sources = [
        WeightedRows(part, w) for part, w in zip(np.array_split(np.arange(rows), len(weights)), weights, strict=True)
    ]
    return StepPlan(lengths, lengths // 2 + 1, sources, batch_size, seed, shuffle)


def rows_of_epoch(plan: StepPlan, epoch: int) -> Counter:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return Counter(int(row) for step in steps for row in plan.rows(step))


@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**63))
def test_every_epoch_takes_every_row_once(rows, batch_size, seed):
    plan = make_plan(rows, batch_size, seed=seed)
    for epoch in range(3):
        assert rows_of_epoch(plan, epoch) == Counter(range(rows))
    sizes = [len(plan.rows(step)) for step in range(plan.steps_per_epoch)]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch_size


def test_weights_count_rows_per_epoch():
    plan = make_plan(60, weights=(1.0, 0.5, 2.0))
    first, second = rows_of_epoch(plan, 0), rows_of_epoch(plan, 1)
    assert all(first[row] == 1 for row in range(20))
    assert all(first[row] == 2 for row in range(40, 60))
    halves = {row for row in range(20, 40) if first[row]}, {row for row in range(20, 40) if second[row]}
    assert [len(half) for half in halves] == [10, 10]
    assert not halves[0] & halves[1], "the second epoch takes the rows that the first left"


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.5, 1.0, 2.5, math.inf]))
    ),
    st.integers(1, 9),
)
def test_no_row_is_taken_more_often_than_its_epochs_allow(sources, batch_size):
    sources = [(5, 1.0, math.inf), *sources]
    starts = np.cumsum([0, *(size for size, _, _ in sources)])
    parts = [
        WeightedRows(np.arange(start, start + size), weight, epochs)
        for start, (size, weight, epochs) in zip(starts, sources, strict=False)
    ]
    lengths = np.full(starts[-1], 9)
    plan = StepPlan(lengths, lengths, parts, batch_size)
    counts, taken = Counter(), []
    for epoch in range(5):
        of_epoch = rows_of_epoch(plan, epoch)
        counts.update(of_epoch)
        taken.append(sum(of_epoch.values()))
    assert len(set(taken)) == 1, "epochs are of one size: others fill the place of what is used up"
    for part in parts:
        of_part = [counts[int(row)] for row in part.rows]
        assert sum(of_part) <= max(1, part.epochs * len(part.rows))
        assert max(of_part) - min(of_part) <= 1, "no row is taken again before all others"
        # Five epochs would take each row five times its weight, or more in another's place.
        assert sum(of_part) >= min(max(1, round(part.weight * len(part.rows))) * 5, part.epochs * len(part.rows) // 1)


def test_a_run_that_is_longer_than_its_rows_is_refused():
    rows = np.arange(10)
    plan = StepPlan(rows + 4, rows + 1, [WeightedRows(rows[:4], 1.0, 2.0), WeightedRows(rows[4:], 1.0, 1.5)], 5)
    # 4 * 2 + 6 * 1.5 are 17 rows: one epoch of 10.
    plan.check_lasts(2)
    with pytest.raises(FireflyError, match=r"as often as its epochs allow after 1 epochs"):
        plan.check_lasts(3)
    with pytest.raises(FireflyError, match="raise them, or train for fewer steps"):
        plan.rows(2)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_apportioned_parts_add_up_and_are_near_their_share(total, sizes):
    parts = apportion(total, sizes)
    assert sum(parts) == total
    assert all(abs(part - total * size / sum(sizes)) < 1 for part, size in zip(parts, sizes, strict=True))


def test_a_step_knows_its_target_tokens():
    plan = make_plan()
    assert plan.target_tokens(4) == sum(int(plan.lengths[row]) // 2 + 1 for row in plan.rows(4))


def test_any_step_can_be_asked_for_first():
    forwards, backwards = make_plan(), make_plan()
    steps = range(3 * forwards.steps_per_epoch)
    expected = [forwards.rows(step).tolist() for step in steps]
    assert [backwards.rows(step).tolist() for step in reversed(steps)] == expected[::-1]


def test_a_plan_reaches_a_worker():
    plan = make_plan()
    plan.rows(0)
    assert pickle.loads(pickle.dumps(plan)).rows(9).tolist() == plan.rows(9).tolist()


def test_epochs_and_seeds_differ():
    plan = make_plan()
    assert plan.rows(0).tolist() != plan.rows(plan.steps_per_epoch).tolist()
    assert plan.rows(0).tolist() != make_plan(seed=4).rows(0).tolist()


def test_without_shuffling_rows_keep_their_order():
    plan = make_plan(20, 8, shuffle=False)
    assert [plan.rows(step).tolist() for step in range(3)] == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    assert plan.rows(3).tolist() == [*range(8)]


def test_fingerprint_tells_plans_apart():
    same, other = make_plan().fingerprint(), make_plan().fingerprint()
    assert same == other
    for changed in (make_plan(seed=9), make_plan(rows=49), make_plan(batch_size=4), make_plan(weights=(2.0,))):
        assert changed.fingerprint() != same


def splitmix64(state: int) -> int:
    """One output of SplitMix64 in plain integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_permutation_sorts_by_splitmix64():
    # The published test vector of SplitMix64 holds the reference itself.
    assert splitmix64(1234567) == 6457827717110365317
    state = splitmix64(splitmix64(0 + 7) + 2)
    hashes = [splitmix64((state + row) % 2**64) for row in range(100)]
    assert permutation(100, 7, 2).tolist() == sorted(range(100), key=hashes.__getitem__)
