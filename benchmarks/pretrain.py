"""Compares further pre-training with what a user would run instead: python -m benchmarks.pretrain --help.

Systems are those of :mod:`benchmarks.throughput`: ``firefly`` takes each document by itself, ``joined`` is
transformers.Trainer on the same documents joined to blocks of ``--max_length`` tokens, its best case: nothing is
padded, and attention looks into the documents before. ``--rows`` are texts.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.throughput import draw, make_parser, measure_all, prepared

GOAL = 1.5
"""How many times as fast as joined documents firefly should be."""


def main() -> None:
    """Measures each system in a process of its own."""
    options = make_parser(__doc__, ("firefly", "joined")).parse_args()
    with prepared(options) as steps:
        lines = measure_all(options, steps)
    if options.out:
        draw(options.out, lines)


def compared(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold firefly's speed against the goal, by type of numbers."""
    remarks = []
    for ours in (line for line in lines if line.get("system") == "firefly"):
        joined = next(line for line in lines if (line.get("system"), line.get("dtype")) == ("joined", ours["dtype"]))
        speed, memory = (ours[key] / joined[key] for key in ("tokens_per_second", "peak_rss_gb"))
        remarks.append(
            f"{ours['dtype']}: {speed:.2f} times the tokens/s of Trainer on joined documents (goal {GOAL}) in "
            f"{memory:.2f} of its memory."
        )
    return remarks


if __name__ == "__main__":
    main()
