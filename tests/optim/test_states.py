"""A run goes on from a checkpoint with whatever its optimizer keeps, digit for digit."""

import pytest
import torch

from firefly_lightning import AtomicCheckpointIO, FireflyModule
from tests.support.choice import DIVIDED
from tests.support.optimizers import ALL, maker
from tests.support.small_runs import train

STEPS, STOP = 5, 2

OF_EACH_KIND = ("Adafactor", "AdamW of 8 bits", "AdamW of torchao", "SGD", "NAdam")
"""Row and column factors, blocks with a table that all weights share, tensors of a class, nothing, and two numbers."""


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torchao compiles its step for every shape, for some ten seconds each; it computes the same without."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", OF_EACH_KIND if DIVIDED else ALL)
def test_a_run_goes_on(tiny_folder, short_rows, tmp_path, name, portable):
    def run(root, steps, last=None):
        module = FireflyModule(str(tiny_folder), optimizer=maker(name))
        plugins, data = [AtomicCheckpointIO(portable)], {"micro_batch_size": 8}
        own = {"module": module, "max_steps": steps, "ckpt_path": last, "plugins": plugins, "data": data}
        return train(tiny_folder, short_rows, root, **own)

    whole = run(tmp_path / "whole", STEPS)
    run(tmp_path, STOP)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.is_dir() is portable
    resumed = run(tmp_path, STEPS, last)
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step >= STOP}
    assert len(set(whole.losses.values())) == STEPS
