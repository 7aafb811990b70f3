"""A run that names no limit of the gradient's norm is not clipped: an engine may have a limit of its own."""

import math

import pytest

from firefly_lightning import FireflyDataModule
from tests.integration.test_parity import REFUSED, SPELLED_OUT, STRATEGIES, relative, weights_apart
from tests.support.choice import DIVIDED
from tests.support.helpers import logged, run_ranks
from tests.support.reference import Trained

STEPS, RATE, EPS = 3, 1e-2, 1e-2
"""Adam's eps is so large that the length of the gradient matters, and not its direction alone."""

TRIED = [name for name in STRATEGIES if name not in REFUSED and (not DIVIDED or name in ("zero2", "zero3", "gemini"))]


@pytest.fixture(scope="module")
def expected(odd_folder, rows_file, tmp_path_factory) -> Trained:
    cache = str(tmp_path_factory.mktemp("cache"))
    data = FireflyDataModule(str(odd_folder), str(rows_file), batch_size=4, cache_dir=cache)
    data.prepare_data()
    data.setup("fit")
    rows = [data.train.plan.rows(step).tolist() for step in range(STEPS)]
    trained = Trained(odd_folder, rows_file, rows, RATE, 1, math.inf, EPS)
    assert min(trained.norms) > 1.05, "a limit of 1, as DeepSpeed has it, would be noticed in every step"
    return trained


@pytest.mark.parametrize("strategy", TRIED)
def test_what_names_no_limit_is_not_clipped(strategy, odd_folder, rows_file, expected, tmp_path):
    processes, _ = STRATEGIES[strategy]
    command = [
        "firefly-fit", "fit", "--model.path", odd_folder, "--data.train_files", rows_file, "--data.batch_size", 4,
        "--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "cpu", "--trainer.max_steps", STEPS,
        "--trainer.enable_progress_bar", "false", "--trainer.strategy", SPELLED_OUT.get(strategy, strategy),
        "--trainer.devices", processes, "--model.warmup_steps", 1, "--model.optimizer", "torch.optim.AdamW",
        "--model.optimizer.lr", RATE, "--model.optimizer.eps", EPS, "--model.optimizer.weight_decay", 0.01,
    ]  # fmt: skip
    run_ranks(processes, command)
    losses = [float(loss) for _, loss in sorted(logged(tmp_path).items())]
    norms = [float(norm) for _, norm in sorted(logged(tmp_path, "grad_norm").items())]
    assert max(map(relative, losses, expected.losses)) < 1e-5
    assert max(map(relative, norms, expected.norms)) < 1e-3
    worst, apart = weights_apart(tmp_path, expected)
    assert apart < 1e-4, worst
