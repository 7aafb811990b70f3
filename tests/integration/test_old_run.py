"""A run, its configuration and its checkpoint from before modules lay in packages go on to the same figures."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.support.helpers import logged, run

OLD_RUN = Path(__file__).parents[1] / "support" / "old_run"
"""Eight steps of release 0.1.0 before the move, with its checkpoint after four: `metrics.csv` has what it logged."""


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(OLD_RUN, tmp_path / "run")


def test_an_old_configuration_and_checkpoint_go_on_to_the_same_losses(folder):
    with (OLD_RUN / "metrics.csv").open() as file:
        before = {int(row["step"]): row for row in csv.DictReader(file) if row["train_loss"]}
    args = ["--config", "config.yaml", "--trainer.default_root_dir", "resumed"]
    run("firefly-fit", "fit", *args, "--ckpt_path", "checkpoints/step=4.ckpt", cwd=folder)
    for name in ("train_loss", "grad_norm", "lr"):
        assert {step: float(value) for step, value in logged(folder / "resumed", name).items()} == pytest.approx(
            {step: float(before[step][name]) for step in range(4, 8)}, rel=1e-6
        ), name


def test_an_old_configuration_begins_with_the_same_loss(folder):
    with (OLD_RUN / "metrics.csv").open() as file:
        first = next(csv.DictReader(file))
    args = ["--config", "config.yaml", "--trainer.default_root_dir", "anew", "--trainer.max_steps", "1"]
    run("firefly-fit", "fit", *args, cwd=folder)
    assert float(logged(folder / "anew")[0]) == pytest.approx(float(first["train_loss"]), rel=1e-7)


def test_an_old_checkpoint_is_exported_to_the_same_bytes(folder):
    run("firefly", "export", "--checkpoint", "checkpoints/step=4.ckpt", "--out", "exported", cwd=folder)
    for line in (OLD_RUN / "exported.sha256").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((folder / "exported" / name).read_bytes()).hexdigest() == digest, name
    before, now = (
        json.loads(path.read_text()) for path in (OLD_RUN / "exported_config.json", folder / "exported" / "config.json")
    )
    now.pop("attn_implementation", None)  # of transformers 4, which the old run was not made with
    assert now == before
