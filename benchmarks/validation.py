"""Measures a validation beside training on the same rows: python -m benchmarks.validation --help.

A training step has a forward and a backward pass and an update, a validation the forward pass alone, with the loss and
accuracies of each kind of rows. Each is measured a few times in turns, and a JSON line says what a token takes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from benchmarks import throughput
from benchmarks.clock import Clock
from benchmarks.ours import Timed, data_module
from benchmarks.processes import alone

GOAL = 0.4
"""Time of a token in a validation, as a share of that in training, at most."""


def main() -> None:
    """Measures each type of numbers in a process of its own."""
    parser = throughput.make_parser(__doc__, ["firefly"])
    parser.add_argument("--rows_of_validation", type=int, default=3300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lines = []
    with throughput.prepared(options):
        for dtype in options.dtypes:
            lines.append(alone(measure, options, dtype))
            print(json.dumps(lines[-1]), flush=True)
    if missed := [line["dtype"] for line in lines if line["share"] > GOAL]:
        sys.exit(f"a token of a validation takes more than {GOAL} of one in training: {', '.join(missed)}")


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Trains some steps and validates, in turns; returns microseconds of a token in both."""
    torch.set_num_threads(options.threads)
    data = data_module(options)
    fraction = min(options.rows_of_validation / len(data.train.rows), 0.5)  # type: ignore[union-attr]
    training, validating = zip(*(one_round(options, dtype, fraction) for _ in range(options.rounds)), strict=True)
    trained, validated = statistics.median(training), statistics.median(validating)
    return {
        "dtype": dtype, "rows_of_validation": options.rows_of_validation, "steps": options.steps,
        "training_microseconds": round(trained * 1e6, 1), "validation_microseconds": round(validated * 1e6, 1),
        "share": round(validated / trained, 3), "goal": GOAL,
    }  # fmt: skip


def one_round(options: argparse.Namespace, dtype: str, fraction: float) -> tuple[float, float]:
    """Seconds of a token in training, and in a validation."""
    from firefly_lightning import FireflyDataModule, FireflyModule

    clock, meter = Clock(options.warmup), Meter()
    data = FireflyDataModule(
        options.folder, train_files=options.rows, batch_size=options.batch_size, max_length=options.max_length,
        val_fraction=fraction,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=options.warmup + options.steps, accelerator=options.device, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[Timed(clock), meter], limit_val_batches=0,
        precision="bf16-mixed" if dtype == "bf16" else "32-true",
    )  # fmt: skip
    module = FireflyModule(options.folder, warmup_steps=0, attention=options.attention)
    trainer.fit(module, data)
    trainer.limit_val_batches = 1.0
    trainer.validate(module, data, verbose=False)
    tokens = sum(tokens for tokens, _ in clock.counts[options.warmup :])
    return clock.seconds / tokens, meter.seconds / meter.tokens


class Meter(L.Callback):
    """Measures the seconds and tokens of a validation, but for its first micro-batch."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self._began = 0, 0.0, 0.0

    def on_validation_batch_end(self, *arguments: Any) -> None:
        """Counts a micro-batch; the batch and its number are the last but one or two arguments."""
        batch = next(one for one in arguments if isinstance(one, dict) and "lengths" in one)
        now = time.perf_counter()
        if self._began:
            self.tokens += sum(batch["lengths"])
            self.seconds = now - self._began
        else:
            self._began = now


def held_to_goals(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold the shares against the goal."""
    return [
        f"{line['dtype']}: {line['share']} of a token in training (goal {GOAL})." for line in lines if "share" in line
    ]


if __name__ == "__main__":
    main()
