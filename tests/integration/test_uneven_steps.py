"""Steps of any size on any number of processes, in micro-batches that divide neither, give what plain PyTorch gives."""

import pytest

from firefly_lightning import FireflyDataModule
from tests.integration.test_parity import ENGINES, REFUSED, SPELLED_OUT, relative, weights_apart
from tests.support.helpers import logged, run_ranks
from tests.support.reference import Trained
from tests.support.strategies import CLIP, LEARNING_RATE, WARMUP

BATCH_SIZE, STEPS = 11, 7
"""Of 60 rows, so that the sixth step, the last of an epoch, has five, and three processes share neither number."""

LIMITS = {"rows": ["--data.micro_batch_size", 3], "tokens": ["--data.micro_batch_tokens", 250]}


@pytest.fixture(scope="module")
def uneven(odd_folder, rows_file, tmp_path_factory) -> Trained:
    """The results that training must give."""
    cache = str(tmp_path_factory.mktemp("cache"))
    data = FireflyDataModule(str(odd_folder), str(rows_file), batch_size=BATCH_SIZE, cache_dir=cache)
    data.prepare_data()
    data.setup("fit")
    steps = [data.train.plan.rows(step).tolist() for step in range(STEPS)]
    assert [len(rows) for rows in steps] == [11, 11, 11, 11, 11, 5, 11]
    return Trained(odd_folder, rows_file, steps, LEARNING_RATE, WARMUP, CLIP, 1e-4)


@pytest.mark.parametrize(
    ("strategy", "processes", "limit"),
    [
        ("auto", 1, "rows"), ("auto", 1, "tokens"), ("ddp", 3, "rows"), ("ddp", 3, "tokens"),
        *((name, 3, "rows") for name in (*ENGINES, "fsdp2", "native_tp") if name not in REFUSED),
    ],
)  # fmt: skip
def test_what_nothing_divides_trains_like_plain_pytorch(strategy, processes, limit, fit_args, uneven, tmp_path):
    command = fit_args(
        tmp_path, 1e-4, "--trainer.strategy", SPELLED_OUT.get(strategy, strategy), "--trainer.devices", processes,
        "--data.batch_size", BATCH_SIZE, "--trainer.max_steps", STEPS, *LIMITS[limit],
    )  # fmt: skip
    run_ranks(processes, command)
    losses, norms = (
        [float(value) for _, value in sorted(logged(tmp_path, name).items())] for name in ("train_loss", "grad_norm")
    )
    assert len(losses) == len(norms) == STEPS
    assert max(map(relative, losses, uneven.losses)) < 1e-5
    assert max(map(relative, norms, uneven.norms)) < 1e-4
    worst, apart = weights_apart(tmp_path, uneven)
    assert apart < 1e-4, worst
