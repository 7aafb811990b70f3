"""A run under torchrun goes on with the nodes that there are, row for row and loss for loss."""

import signal

import pytest

from benchmarks.elastic_run import ElasticRun, Recorded
from benchmarks.nodes import nodes
from firefly_lightning import FireflyDataModule
from tests.integration.test_parity import relative
from tests.support.helpers import logged
from tests.support.reference import Trained
from tests.support.strategies import CLIP, LEARNING_RATE, WARMUP

BATCH_SIZE, STEPS = 8, 24
"""Three nodes and two do not divide the same rows."""


@pytest.fixture(scope="module")
def steps(odd_folder, rows_file, tmp_path_factory) -> list[list[int]]:
    """Numbers of the rows of every step."""
    cache = str(tmp_path_factory.mktemp("cache"))
    data = FireflyDataModule(str(odd_folder), str(rows_file), batch_size=BATCH_SIZE, cache_dir=cache)
    data.prepare_data()
    data.setup("fit")
    return [sorted(data.train.plan.rows(step).tolist()) for step in range(STEPS)]


@pytest.fixture
def arguments(fit_args, tmp_path):
    """A command that the launcher types whatever there is already."""
    return fit_args(
        tmp_path, 1e-4, "--model", f"{Recorded.__module__}.Recorded", "--model.pause", 0.5, "--trainer.max_steps",
        STEPS, "--checkpoint.every_n_steps", 1, "--ckpt_path", "auto", "--samples.prompts", "[]",
        "--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.timeout", "0:01:00",
    )  # fmt: skip


def check(run: ElasticRun, steps: list[list[int]], expected: Trained) -> None:
    """Every step is there once with its loss, and each that was finished had its rows, by however many processes."""
    losses = logged(run.root)
    assert sorted(losses) == [*range(STEPS)]
    assert max(map(relative, map(float, (losses[step] for step in range(STEPS))), expected.losses)) < 1e-5
    whole = set()
    for taken in run.taken().values():
        assert list(taken) == [*range(min(taken), max(taken) + 1)], "steps follow each other"
        assert all(set(rows) <= set(steps[step]) for step, rows in taken.items())
        whole |= {step for step, rows in taken.items() if rows == steps[step]}
    assert whole == {*range(STEPS)}


def test_a_run_goes_on_with_the_nodes_that_are_left_and_with_those_that_come_back(
    arguments, steps, odd_folder, rows_file, tmp_path
):
    with nodes(3) as where:
        run = ElasticRun(where, tmp_path, arguments)
        for node in range(3):
            run.start(node)
        run.wait_for(processes=3, steps=2)
        where.signal(2, signal.SIGKILL)
        run.wait_for(processes=2, steps=2)
        before = len(run.taken())
        run.start(2)
        run.wait_for(processes=3, steps=2, after=before)
        assert set(run.ended()) == {0}
    check(run, steps, Trained(odd_folder, rows_file, steps, LEARNING_RATE, WARMUP, CLIP, 1e-4))


def test_a_process_that_hangs_is_found_and_a_killed_one_started_again(
    arguments, steps, odd_folder, rows_file, tmp_path
):
    arguments[-1] = "0:00:20"
    with nodes(2) as where:
        run = ElasticRun(where, tmp_path, arguments)
        for node in range(2):
            run.start(node)
        run.wait_for(processes=2, steps=2)
        assert where.signal(1, signal.SIGSTOP, but="torchrun")
        run.wait_for(processes=2, steps=2, after=len(run.taken()))
        before = len(run.taken())
        assert where.signal(0, signal.SIGKILL, but="torchrun")
        run.wait_for(processes=2, steps=2, after=before)
        assert set(run.ended()) == {0}
    check(run, steps, Trained(odd_folder, rows_file, steps, LEARNING_RATE, WARMUP, CLIP, 1e-4))
