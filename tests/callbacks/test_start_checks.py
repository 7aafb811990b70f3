"""What a run says of its settings before it loads weights; the fixture's file has 60 rows."""

import timeit

import pytest
import torch

from firefly_lightning.callbacks import start_checks
from tests.support.helpers import fit, one_line

SHORT = ["--trainer.max_steps", 2, "--model.warmup_steps", 1, "--data.batch_size", 8, "--data.val_fraction", 0.1,
         "--trainer.val_check_interval", 2]  # fmt: skip
"""54 rows to train on, 7 steps an epoch: nothing to warn of."""

NULL = ["--trainer.check_val_every_n_epoch", "null"]

WARNINGS = {
    "nothing": ([], None),
    "batch": (["--data.batch_size", 64, *NULL], "data.batch_size 64 is more than the 54 rows of an epoch"),
    "batch of an epoch": (["--data.batch_size", 54, *NULL], None),
    "warm-up": (["--model.warmup_steps", 3000], "model.warmup_steps 3,000 is not less than the 2 steps of the run"),
    "warm-up of all steps": (["--model.warmup_steps", 2], "so that the learning rate ends at 1.5e-05 instead of 3e-05"),
    "own schedule": (
        ["--model.warmup_steps", 3000, "--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR"],
        None,
    ),
    "interval": (["--trainer.val_check_interval", 3, *NULL], "has 2 steps and is first validated after 3, so never"),
    "micro-batches": (["--data.micro_batch_size", 2, *NULL], None),
    "epochs": (["--trainer.check_val_every_n_epoch", 3], "has 2 steps and is first validated after 16, so never"),
    "end of an epoch": (["--trainer.val_check_interval", 1.0], "has 2 steps and is first validated after 7"),
    "no validation": (["--data.val_fraction", 0, "--trainer.val_check_interval", 1.0], None),
    "metric": (
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_los",
         "--trainer.callbacks.strict", "false"],
        "EarlyStopping monitors val_los, which is not logged; did you mean val_loss?",
    ),
    "metric of a kind": (
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_perplexity_of/Sumary",
         "--trainer.callbacks.strict", "false"],
        "did you mean val_perplexity_of/Summary?",
    ),
    "own metric": (
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "cleverness",
         "--trainer.callbacks.strict", "false"],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_likely_a_mistake_is_said_once_and_nothing_else(name, model_folder, rows_file, tmp_path, monkeypatch):
    more, expected = WARNINGS[name]
    said = []
    monkeypatch.setattr(start_checks, "rank_zero_info", said.append)
    fit(model_folder, rows_file, tmp_path, *SHORT, *more)
    assert len(said) == (expected is not None), said
    assert not expected or (said[0].startswith("warning: ") and expected in said[0])


def test_an_interval_longer_than_an_epoch_is_refused_in_steps(model_folder, rows_file, tmp_path):
    more = ["--trainer.val_check_interval", 8, "--data.micro_batch_size", 2]
    message = one_line(fit(model_folder, rows_file, tmp_path, *SHORT, *more, check=False))
    assert message.startswith("trainer.val_check_interval 8 is more than the 7 steps of an epoch; choose less")


def test_a_run_that_only_waits_for_a_mistyped_metric_ends_in_one_line(model_folder, rows_file, tmp_path):
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_los"]
    message = one_line(fit(model_folder, rows_file, tmp_path, *SHORT, *stopping, check=False))
    assert "`val_los`" in message
    assert "`val_loss`" in message


@pytest.mark.parametrize(
    ("precision", "times", "warned"), [("bf16-mixed", 2.0, True), ("bf16-mixed", 1.1, False), ("32-true", 2.0, False)]
)
def test_16_bits_that_are_slower_here_are_said(
    precision, times, warned, model_folder, rows_file, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(start_checks, "rank_zero_info", said.append)
    monkeypatch.setattr(start_checks, "times_as_long", lambda dtype: times if dtype == torch.bfloat16 else 0.5)
    fit(model_folder, rows_file, tmp_path, *SHORT, "--trainer.precision", precision)
    expected = "warning: trainer.precision bf16-mixed: products of matrices take 2.0 times as long in bfloat16 as in"
    assert [message.startswith(expected) for message in said] == [True] * warned


def test_products_are_measured():
    """Against products of the same size that take some seconds, as far as other work on the machine lets them agree."""
    assert start_checks.times_as_long(torch.float32) == pytest.approx(1, rel=0.8)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(128, 512).to(dtype), torch.randn(512, 2048).to(dtype)
        rates[dtype] = min(timeit.repeat(lambda left=left, right=right: left @ right, number=1, repeat=5))
    expected = rates[torch.bfloat16] / rates[torch.float32]
    assert expected / 3 < start_checks.times_as_long(torch.bfloat16) < 3 * expected
