"""A run moves between strategies and numbers of processes, and goes on like one that was never stopped."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.test_parity import REFUSED, SPELLED_OUT, STRATEGIES, ran, relative, weights_apart
from tests.support.choice import DIVIDED
from tests.support.helpers import logged, run_ranks
from tests.support.strategies import BATCH_SIZE, STEPS

SAVED = STEPS // 2 + 1
"""Steps before the move."""

MATRIX = ("auto", "ddp", "zero1", "zero2", "zero3", "gemini", "tensor_parallel", "fsdp2", "native_tp")

TARGETS = MATRIX[1::2] if DIVIDED else MATRIX
"""To which runs are moved; with `--divided` from one of the others to each of these."""

TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 2e-2}

SHARED_BOTH_WAYS = json.dumps(
    {
        "class_path": "firefly_lightning.strategies.TensorParallelStrategy",
        "init_args": {"tp_size": 2, "zero_stage": 1},
    }
)
"""Four processes: two share each row, two share the rows and the optimizer's states."""


def sources_of(target: str, every: bool) -> list[tuple[str, str]]:
    """Strategies to move from, and in which precision: all in both, or two, or one, so that each is moved from."""
    known = [source for source in MATRIX if source not in REFUSED]
    if every:
        return [(source, precision) for precision in TOLERANCES for source in known]
    at = MATRIX.index(target)
    precisions = list(TOLERANCES)
    if DIVIDED:
        return [(known[(at + 1) % len(known)], precisions[at % 2])]
    return list(zip([known[(at + step) % len(known)] for step in (1, 4)], precisions, strict=True))


def command(fit_args, strategy: str, precision: str, root: Path, *more: object) -> list[object]:
    processes, _ = STRATEGIES[strategy]
    own = ["--trainer.strategy", SPELLED_OUT.get(strategy, strategy), "--trainer.devices", processes]
    return fit_args(root, 1e-4, *own, "--trainer.precision", precision, *more)


@pytest.fixture(scope="module")
def saved(fit_args, tmp_path_factory, request):
    """Checkpoints of runs that were stopped, by strategy and precision; made in all that moves need when one is."""
    root = tmp_path_factory.mktemp("saved")
    stopping = ["--model", "tests.support.helpers.Stopping", "--model.stop_step", SAVED - 1]

    every = request.config.getoption("--full")
    moved = {"32-true": MATRIX}
    for source, precision in (move for target in TARGETS for move in sources_of(target, every)):
        moved[precision] = {*moved.get(precision, ()), source}

    def checkpoint(strategy: str, precision: str = "32-true"):
        folders = {each: root / f"{strategy}-{each}" for each, sources in moved.items() if strategy in sources}
        if not folders[precision].exists():
            runs = (command(fit_args, strategy, each, folder, *stopping) for each, folder in folders.items())
            run_ranks(STRATEGIES[strategy][0], *runs)
        return folders[precision] / "checkpoints" / "last.ckpt"

    return checkpoint


def resuming(checkpoint: Path, micro_batch_size: int) -> list[object]:
    noting = ["--model", "tests.support.helpers.NotingRows"]
    return [*noting, "--ckpt_path", checkpoint, "--data.micro_batch_size", micro_batch_size]


def rows_taken(root: Path, ranks: int) -> dict[int, list[int]]:
    """Numbers of the rows of every step; ranks that share rows have the same."""
    taken: dict[int, set[int]] = {}
    for rank in range(ranks):
        for line in (root / f"rows-{rank}.txt").read_text().splitlines():
            step, *rows = map(int, line.split())
            taken.setdefault(step, set()).update(rows)
    return {step: sorted(rows) for step, rows in taken.items()}


def problems_of(root: Path, ranks: int, expected, planned_rows, tolerance: float) -> list[str]:
    losses = {step: float(loss) for step, loss in logged(root).items()}
    assert sorted(losses) == list(range(SAVED, STEPS))
    assert rows_taken(root, ranks) == {step: sorted(planned_rows[step]) for step in losses}
    apart = max(relative(losses[step], expected[1e-4].losses[step]) for step in losses)
    worst, weights = weights_apart(root, expected[1e-4])
    print(f"{root.name}: losses {apart:.1e}, weights {weights:.1e}")
    return [] if max(apart, weights) <= tolerance else [f"{root.name}: losses {apart:.1e}, {worst} {weights:.1e}"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_moves_between_strategies(target, saved, fit_args, expected, planned_rows, tmp_path, request):
    """`--full` takes every pair in both precisions."""
    processes, shares = STRATEGIES[target]
    moves = sources_of(target, request.config.getoption("--full"))
    roots = [tmp_path / f"{source} to {target} in {precision}" for source, precision in moves]
    commands = [
        command(fit_args, target, precision, root, *resuming(saved(source, precision), BATCH_SIZE // shares // 2))
        for root, (source, precision) in zip(roots, moves, strict=True)
    ]
    if ran(target, processes, *commands) is None:
        return
    problems = [
        problem
        for root, (_, precision) in zip(roots, moves, strict=True)
        for problem in problems_of(root, processes, expected, planned_rows, TOLERANCES[precision])
    ]
    assert not problems, "\n".join(problems)


def test_every_strategy_is_moved_from_and_to():
    """What runs without `--full`."""
    pairs = [(source, target) for target in TARGETS for source, _ in sources_of(target, every=False)]
    sources = {source for source, _ in pairs}
    if DIVIDED:
        assert sources | set(TARGETS) == set(MATRIX[1:])
    else:
        assert sources == {source for source in MATRIX if source not in REFUSED}
    assert len(set(pairs)) == len(pairs) == (1 if DIVIDED else 2) * len(TARGETS)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "gemini"])
def test_a_run_goes_on_with_fewer_processes(strategy, saved, fit_args, expected, planned_rows, tmp_path):
    root = tmp_path / f"{strategy} on one process"
    own = [*resuming(saved(strategy), BATCH_SIZE // 2), "--trainer.devices", 1]
    run_ranks(1, command(fit_args, strategy, "32-true", root, *own))
    assert not problems_of(root, 1, expected, planned_rows, TOLERANCES["32-true"])


def test_a_run_goes_on_with_more_processes_that_share_rows_and_weights(
    saved, fit_args, expected, planned_rows, tmp_path
):
    more, four, back = (tmp_path / name for name in ("one to four", "four", "four to two"))
    places = ["--trainer.strategy", SHARED_BOTH_WAYS, "--trainer.devices", 4]
    stopped = ["--model", "tests.support.helpers.Stopping", "--model.stop_step", SAVED - 1]
    run_ranks(
        4,
        command(fit_args, "auto", "32-true", more, *resuming(saved("auto"), BATCH_SIZE // 2), *places),
        command(fit_args, "auto", "32-true", four, *places, *stopped),
    )
    run_ranks(2, command(fit_args, "ddp", "32-true", back, *resuming(four / "checkpoints", 2)))
    for root, ranks in ((more, 4), (back, 2)):
        assert not problems_of(root, ranks, expected, planned_rows, TOLERANCES["32-true"])


def test_the_state_of_the_optimizer_is_that_of_one_device(saved):
    """Every strategy's file holds the same moments under the same names, not only what leads to the same losses."""

    def states(strategy: str) -> dict[str, torch.Tensor]:
        files = saved(strategy).glob("*-*.safetensors")
        return {f"{file.name.split('-')[0]}/{name}": value for file in files for name, value in load_file(file).items()}

    expected = states("auto")
    for strategy in MATRIX:
        if strategy not in REFUSED:
            found = states(strategy)
            assert found.keys() == expected.keys(), strategy
            for name, value in expected.items():
                assert found[name].shape == value.shape, name
                assert float((found[name] - value).abs().max()) <= 1e-4 * float(value.abs().max()), (strategy, name)
