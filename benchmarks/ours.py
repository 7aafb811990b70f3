"""Trains with this project as its users do, for :mod:`benchmarks.throughput`."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L

from benchmarks.clock import Clock
from firefly_lightning import FireflyDataModule, FireflyModule


def prepare(options: argparse.Namespace, steps: object) -> Callable[[Clock], float]:
    """A function that trains and returns the last step's loss; the data module finds the rows of the steps itself."""
    return partial(run, options, data_module(options))


def data_module(options: argparse.Namespace) -> FireflyDataModule:
    """A data module with the rows tokenised and their steps planned."""
    data = FireflyDataModule(
        options.folder, train_files=options.rows, batch_size=options.batch_size, max_length=options.max_length
    )
    data.prepare_data()
    data.setup("fit")
    return data


def run(options: argparse.Namespace, data: FireflyDataModule, clock: Clock) -> float:
    """Trains as users of this project do, but without logging to files; returns the loss of the last step."""
    trainer = L.Trainer(
        max_steps=options.warmup + options.steps, accelerator=options.device, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[Timed(clock)],
        precision="bf16-mixed" if options.dtype == "bf16" else "32-true",
    )  # fmt: skip
    adapter = "lora" if options.system == "lora" else None
    module = FireflyModule(options.folder, warmup_steps=0, attention=options.attention, adapter=adapter)
    trainer.fit(module, data)
    return float(trainer.callback_metrics["train_loss"])


class Timed(L.Callback):
    """Tells the clock the end and the tokens of every step.

    Args:
        clock: The clock to tell.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Tells the clock; the batch is the last argument but one."""
        batch = arguments[3]
        self._clock.counts.append((sum(batch["lengths"]), len(batch["target_ids"])))
        self._clock.step_ended()
