"""Fixtures of the tests of all strategies: a model that is awkward to split, and the results its training must give."""

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning import FireflyDataModule
from tests.conftest import train_tokenizer
from tests.support.choice import DIVIDED
from tests.support.reference import Trained

BATCH_SIZE, LEARNING_RATE, WARMUP, CLIP = 8, 1e-3, 3, 0.1

STEPS = 8 if DIVIDED else 20
"""Of a run of a strategy: eight show warm-up, clipping and a falling rate."""


@pytest.fixture(scope="session")
def odd_folder(tmp_path_factory, reviews) -> Path:
    """A model whose vocabulary two ranks do not divide evenly; they divide its six heads, which are no power of two."""
    folder = tmp_path_factory.mktemp("odd")
    tokenizer = train_tokenizer(reviews, 1499)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 1499
    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=1499, hidden_size=48, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2, pad_token_id=3
        )
    )
    with torch.no_grad():  # biases and layer norms away from 0 and 1, so that each of them matters
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def planned_rows(odd_folder, rows_file, tmp_path_factory) -> list[list[int]]:
    """Numbers of the rows of every step."""
    return planned(FireflyDataModule, odd_folder, rows_file, tmp_path_factory.mktemp("cache"))


def planned(data_class: type[FireflyDataModule], folder: Path, rows_file: Path, cache: Path) -> list[list[int]]:
    """What makes every step, as the plan of steps gives it; other tests check the plan."""
    data = data_class(str(folder), str(rows_file), batch_size=BATCH_SIZE, cache_dir=str(cache))
    data.prepare_data()
    data.setup("fit")
    return [data.train.plan.rows(step).tolist() for step in range(STEPS)]


@pytest.fixture(scope="session")
def expected(odd_folder, rows_file, planned_rows) -> dict[float, Trained]:
    """The results that training must give, by Adam's eps."""
    trained = {
        eps: Trained(odd_folder, rows_file, planned_rows, LEARNING_RATE, WARMUP, CLIP, eps) for eps in (1e-4, 1e-8)
    }
    assert all(norm > 1.5 * CLIP for run in trained.values() for norm in run.norms), "clipping is active in every step"
    return trained


@pytest.fixture(scope="session")
def fit_args(odd_folder, rows_file):
    """Makes the arguments of a run that must give the results of `expected`; the strategy is to be added."""

    def make(root: Path, eps: float, *more: object) -> list[object]:
        return [
            "firefly-fit", "fit", "--model.path", odd_folder, "--data.train_files", rows_file,
            "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false",
            "--trainer.max_steps", STEPS, "--data.batch_size", BATCH_SIZE, "--model.warmup_steps", WARMUP,
            "--trainer.gradient_clip_val", CLIP, "--model.optimizer", "torch.optim.AdamW",
            "--model.optimizer.lr", LEARNING_RATE, "--model.optimizer.eps", eps,
            "--model.optimizer.weight_decay", 0.01, *more,
        ]  # fmt: skip

    return make
