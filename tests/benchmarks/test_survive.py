"""The plan of the kills, and what RESULTS.md says of them; the runs are those of tests/integration/test_elastic."""

import itertools
import random

from benchmarks.survive import KILLS, held_to_goals, plan_of_kills


def test_kills_are_apart_of_all_kinds_and_leave_time_for_a_node_to_come_back():
    planned = plan_of_kills(30, 300, random.Random(0))
    steps, kinds = zip(*planned, strict=True)
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(steps))
    assert steps[-1] < 260
    assert {kind: kinds.count(kind) for kind in KILLS} == {
        "process": 8, "node": 8, "save": 7, "asynchronous save": 7
    }  # fmt: skip
    assert planned != plan_of_kills(30, 300, random.Random(1))


def test_what_is_said_of_a_run():
    whole = {
        "steps": 300, "starts": 4, "steps_made_again": 2, "steps_missing_or_doubled": 1, "steps_of_other_rows": 0,
        "shown_once_by_tensorboard": False, "largest_difference": 2e-6, "steps_within_goal": 299,
    }  # fmt: skip
    kills, steps, losses = held_to_goals([{"kill": 1, "what": "node"}, {"kill": 2, "what": "save"}, whole])
    assert kills.startswith("2 kills: 0 times process, 1 times node, 1 times save")
    assert "1 are missing or doubled" in steps
    assert "TensorBoard shows NOT each once" in steps
    assert "by 2.0e-06 of themselves at the most; 299 of 300 by no more than 1e-06" in losses
