"""What a step took and waited for, against sleeps of known length."""

import time

import pytest

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.data.batches import PlannedBatches
from tests.helpers import fit, logged

NAP = 0.05
STEPS = ["--trainer.max_steps", 3, "--data.batch_size", 4, "--data.micro_batch_size", 2]


class SlowBatches(PlannedBatches):
    def __getitem__(self, index):
        time.sleep(NAP)
        return super().__getitem__(index)


class SlowData(FireflyDataModule):
    """Takes its time for every micro-batch."""

    def _planned(self, *args, **kwargs):
        batches = super()._planned(*args, **kwargs)
        batches.__class__ = SlowBatches
        return batches


class Counting(FireflyModule):
    """Logs how many tokens a step has."""

    def training_step(self, batch, batch_idx):
        self.log("tokens", float(batch["step_target_tokens"]))
        return super().training_step(batch, batch_idx)


class Slow(Counting):
    """Takes its time to learn, in which a worker gets ahead."""

    def training_step(self, batch, batch_idx):
        time.sleep(4 * NAP)
        return super().training_step(batch, batch_idx)


def seconds(root) -> list[tuple[float, float]]:
    """Of each step: how long it took by its tokens, and how much of that was waiting."""
    rates, waits = logged(root, "target_tokens_per_second"), logged(root, "data_wait")
    tokens = logged(root, "tokens")
    assert rates.keys() == waits.keys() == {0, 1, 2}
    took = {step: float(tokens[step]) / float(rate) for step, rate in rates.items()}
    return [(took[step], float(waits[step]) * took[step]) for step in rates]


def test_waiting_for_rows_is_told_from_work(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *STEPS, "--data", "tests.test_throughput.SlowData",
        "--model", "tests.test_throughput.Counting")  # fmt: skip
    for took, waited in seconds(tmp_path):
        assert 2 * NAP <= waited < took


def test_what_a_worker_prepares_in_time_is_not_waited_for(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *STEPS, "--data", "tests.test_throughput.SlowData",
        "--model", "tests.test_throughput.Slow", "--data.num_workers", 1)  # fmt: skip
    for took, waited in seconds(tmp_path)[1:]:
        assert took >= 8 * NAP
        assert waited == pytest.approx(0, abs=NAP)
