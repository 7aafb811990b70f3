"""A run moves between strategies: from each to each, it goes on like one that was never stopped."""

import pytest

from tests.helpers import logged
from tests.strategies.conftest import BATCH_SIZE, STEPS
from tests.strategies.test_parity import REFUSED, SPELLED_OUT, STRATEGIES, ran, relative, weights_apart

SAVED = 11
"""Steps before the move."""

MOVING = ("auto", "ddp", "zero1", "zero2", "zero3", "gemini", "tensor_parallel", "fsdp2", "native_tp")


def command(fit_args, strategy: str, root, *more: object) -> list[object]:
    processes, _ = STRATEGIES[strategy]
    own = ["--trainer.strategy", SPELLED_OUT.get(strategy, strategy), "--trainer.devices", processes]
    return fit_args(root, 1e-4, *own, *more)


@pytest.fixture(scope="module")
def saved(fit_args, tmp_path_factory):
    """Checkpoints of runs that were stopped, by strategy; made when they are asked for."""
    root = tmp_path_factory.mktemp("saved")

    def checkpoint(strategy: str):
        folder = root / strategy
        if not folder.exists():
            stopping = ["--model", "tests.helpers.Stopping", "--model.stop_step", SAVED - 1]
            assert ran(strategy, STRATEGIES[strategy][0], command(fit_args, strategy, folder, *stopping))
        return folder / "checkpoints" / "last.ckpt"

    return checkpoint


@pytest.mark.parametrize("target", MOVING)
def test_a_run_moves_from_every_strategy(target, saved, fit_args, expected, tmp_path):
    processes, shares = STRATEGIES[target]
    sources = [source for source in MOVING if source not in REFUSED]
    commands = [
        command(
            fit_args, target, tmp_path / source, "--ckpt_path", saved(source),
            "--data.micro_batch_size", BATCH_SIZE // shares // 2,
        )
        for source in sources
    ]  # fmt: skip
    if not ran(target, processes, *commands):
        return
    problems = []
    for source in sources:
        losses = {step: float(loss) for step, loss in logged(tmp_path / source).items()}
        assert sorted(losses) == list(range(SAVED, STEPS))
        apart = max(relative(losses[step], expected[1e-4].losses[step]) for step in losses)
        worst, weights = weights_apart(tmp_path / source, expected[1e-4])
        print(f"{source} → {target}: losses {apart:.1e}, weights {weights:.1e}")
        if not max(apart, weights) <= 1e-4:
            problems.append(f"{source} → {target}: losses {apart:.1e}, {worst} {weights:.1e}")
    assert not problems, "\n".join(problems)
