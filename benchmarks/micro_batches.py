"""Measures a step in micro-batches, bounded by rows and by tokens: python -m benchmarks.micro_batches --help.

A step of 64 rows is taken in micro-batches of at most 16 rows, and in as few as have no more tokens than the heaviest
of 16 rows would have if rows were put together by their lengths. A JSON line for each has the micro-batches of a step,
tokens a second and peak memory; the medians of some rounds in turns, each in a process of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from benchmarks import throughput
from benchmarks.machine import peak_gb
from benchmarks.ours import data_module
from benchmarks.processes import alone

ROWS = 16
"""Most rows of a micro-batch."""


def main() -> None:
    """Measures both bounds in turns."""
    parser = throughput.make_parser(__doc__, ["firefly"])
    parser.set_defaults(batch_size=4 * ROWS, steps=4, warmup=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with throughput.prepared(options):
        bound = alone(heaviest, options)
        limits: dict[str, dict[str, Any]] = {
            "rows": {"micro_batch_size": ROWS},
            "tokens": {"micro_batch_tokens": bound},
        }
        for dtype in options.dtypes:
            rounds = [
                [alone(measure, options, dtype, limit) for limit in limits.values()] for _ in range(options.rounds)
            ]
            for (name, limit), found in zip(limits.items(), zip(*rounds, strict=True), strict=True):
                medians = {key: round(statistics.median(one[key] for one in found), 2) for key in found[0]}
                print(json.dumps({"bound": name, "dtype": dtype, **limit, **medians}), flush=True)


def heaviest(options: argparse.Namespace) -> int:
    """Most tokens, padding among them, of 16 rows of like length of any step that is measured."""
    data = data_module(options)
    most = 0
    for step in range(options.warmup + options.steps):
        lengths = sorted((len(data.train.rows[row].input_ids) for row in data.train.plan.rows(step)), reverse=True)  # type: ignore[union-attr]
        most = max(most, ROWS * lengths[0])
    return most


def measure(options: argparse.Namespace, dtype: str, limit: dict[str, Any]) -> dict[str, float]:
    """Trains with micro-batches of a limit."""
    from firefly_lightning import FireflyDataModule, FireflyModule

    torch.set_num_threads(options.threads)
    meter = Meter(options.warmup)
    data = FireflyDataModule(
        options.folder, train_files=options.rows, batch_size=options.batch_size, max_length=options.max_length, **limit
    )
    trainer = L.Trainer(
        max_steps=options.warmup + options.steps, accelerator=options.device, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[meter],
        precision="bf16-mixed" if dtype == "bf16" else "32-true",
    )  # fmt: skip
    before = peak_gb()
    trainer.fit(FireflyModule(options.folder, warmup_steps=0, attention=options.attention), data)
    return {
        "micro_batches": meter.micro_batches / options.steps, "tokens_per_second": meter.tokens / meter.seconds,
        "peak_rss_gb": peak_gb(), "libraries_gb": before,
    }  # fmt: skip


class Meter(L.Callback):
    """Counts micro-batches, tokens and seconds of the steps after the first few."""

    def __init__(self, warmup: int) -> None:
        self.tokens, self.micro_batches, self.seconds = 0, 0, 0.0
        self._warmup, self._began = warmup, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Counts a micro-batch; the batch is the last argument but one."""
        if self._began:
            self.micro_batches += 1
            self.tokens += sum(arguments[2]["lengths"])
            self.seconds = time.perf_counter() - self._began
        elif trainer.global_step == self._warmup:
            self._began = time.perf_counter()


def compared(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that compare the bounds."""
    found = {(line["bound"], line["dtype"]): line for line in lines if "bound" in line}
    remarks = []
    for dtype in {dtype: None for _, dtype in found}:
        rows, tokens = found["rows", dtype], found["tokens", dtype]
        speed = tokens["tokens_per_second"] / rows["tokens_per_second"]
        remarks.append(
            f"{dtype}: by tokens, {tokens['micro_batches']} micro-batches a step in place of {rows['micro_batches']}, "
            f"{speed:.2f} times the tokens/s in {tokens['peak_rss_gb'] / rows['peak_rss_gb']:.2f} of the memory."
        )
    return remarks


if __name__ == "__main__":
    main()
