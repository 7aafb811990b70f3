"""Compares training an adapter with what a user would run instead: python -m benchmarks.lora --help.

Systems are those of :mod:`benchmarks.throughput`: ``lora`` and ``firefly`` of this project, with an adapter and in
full, and ``peft``, transformers.Trainer with the same adapter. A last line for each type of numbers shows what a frozen
head spares: the seconds of the loss of a step's targets, with the head's gradient and without.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.floor import DTYPES
from benchmarks.processes import alone
from benchmarks.throughput import draw, make_parser, measure_all, prepared


def main() -> None:
    """Measures each system in a process of its own, and the head."""
    options = make_parser(__doc__, ("lora", "firefly", "peft")).parse_args()
    with prepared(options) as steps:
        lines = measure_all(options, steps)
    targets = sum(sum(mask) for _, mask in steps[-1])
    vocabulary = lines[0]["vocabulary"]
    for dtype in options.dtypes:
        print(json.dumps(alone(measure_head, options, dtype, targets, vocabulary)), flush=True)
    if options.out:
        draw(options.out, lines)


def measure_head(options: argparse.Namespace, dtype: str, targets: int, vocabulary: int) -> dict[str, Any]:
    """Measures the loss of a step's targets and its gradients, once with a trained head and once with a frozen one.

    Args:
        options: Options of the command.
        dtype: A key of ``DTYPES``.
        targets: Learned tokens of the step.
        vocabulary: Rows of the head.
    """
    from firefly_lightning.model.loss import fused_target_cross_entropy

    torch.set_num_threads(options.threads)
    hidden = torch.randn(targets, options.hidden, dtype=DTYPES[dtype], requires_grad=True)
    ids = torch.randint(vocabulary, (targets,))
    found: dict[str, Any] = {"head": dtype, "targets": targets, "vocabulary": vocabulary}
    for name, trained in (("trained", True), ("frozen", False)):
        # As small as those of a model: of wider scores softmax makes numbers too small for the processor's fast path.
        weight = (0.02 * torch.randn(vocabulary, options.hidden, dtype=DTYPES[dtype])).requires_grad_(trained)

        def step(weight: torch.Tensor = weight) -> None:
            torch.autograd.backward(fused_target_cross_entropy(hidden, weight, ids))

        step()
        began = time.perf_counter()
        for _ in range(3):
            step()
        found[f"{name}_seconds"] = round((time.perf_counter() - began) / 3, 4)
    return found


def compared(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold the adapter's speed and memory against the goals, by type of numbers, and the head's."""
    remarks = []
    for ours in (line for line in lines if line.get("system") == "lora"):
        here = {line["system"]: line for line in lines if line.get("dtype") == ours["dtype"]}
        speed = {name: ours["tokens_per_second"] / line["tokens_per_second"] for name, line in here.items()}
        memory = ours["peak_rss_gb"] / here["peft"]["peak_rss_gb"]
        remarks.append(
            f"{ours['dtype']}: {speed['peft']:.1f} times the tokens/s of Trainer with peft (goal 5) in {memory:.2f} of "
            f"its memory (goal 0.35), and {speed['firefly']:.2f} times those of training all weights (goal 1.3)."
        )
    remarks += [
        f"{line['head']}: the loss of a step's {line['targets']} targets, with its gradients, takes "
        f"{line['frozen_seconds']} s with a frozen head and {line['trained_seconds']} s with a trained one."
        for line in lines
        if "head" in line
    ]
    return remarks


if __name__ == "__main__":
    main()
