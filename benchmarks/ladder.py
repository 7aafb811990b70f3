"""Measures what each lever of the fast Bloom brings, one after another: python -m benchmarks.ladder --help.

The first line is the original recipe as a plain loop: Hugging Face's Bloom, rows padded to the longest of the batch,
logits at every position. Every further line adds a lever to those before, on the same rows, in a process of its own.

Beside the measured time stands a time that is predicted from counts alone: floating-point operations of the matrix
products at the rate of a bare product, and bytes that all other operations read and write at the rate of a bare copy
(both rates measured in the same process), as in the roofline model (Williams, Waterman and Patterson 2009). The
prediction leaves out what operations cost beyond their bytes, such as exponentials. Seconds, operations and bytes are
those of 1,000 tokens without padding.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import BloomForCausalLM

from benchmarks.floor import copy_rate, matrix_products, product_rate
from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone
from benchmarks.throughput import BLUE, GREY, make_model
from firefly_lightning import FireflyDataModule
from firefly_lightning.data.batches import collate
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.loss import fused_target_cross_entropy, target_cross_entropy


class Levers(NamedTuple):
    """The levers: what a rung does otherwise than the original recipe."""

    targets: bool = False
    """Compute the head only where a target follows."""
    chunks: bool = False
    """Compute head and loss in chunks, with their gradients in the same pass."""
    fused: bool = False
    """Compute attention and GELU in one kernel each, and the last block only where a target follows."""
    grouped: bool = False
    """Put rows of like length into a batch."""
    packed: bool = False
    """Leave out padding."""
    optimizer: bool = False
    """Step AdamW in one pass over the weights."""
    bf16: bool = False
    """Compute products in bfloat16."""


NAMES = {
    "": "original recipe", "targets": "+ head at targets", "chunks": "+ loss in chunks", "fused": "+ fused attention",
    "grouped": "+ rows of like length", "packed": "+ no padding", "optimizer": "+ AdamW in one pass", "bf16": "+ bf16",
}  # fmt: skip


def main() -> None:
    """Measures each rung, the recipe with one more lever, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, help="by default one for 64 of the width")
    parser.add_argument("--vocabulary", type=int, help="tokens; what the tokenizer lacks is made up")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="that are counted, after one that is not")
    parser.add_argument("--out", type=Path, help="PNG of the figures")
    options = parser.parse_args()
    print(json.dumps(machine() | {"threads": options.threads, "rows a step": options.batch_size}), flush=True)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        for rung in range(len(NAMES)):
            lines.append(alone(measure, options, folder, rung))
            print(json.dumps(lines[-1]), flush=True)
    if options.out:
        draw(options.out, lines)


def measure(options: argparse.Namespace, folder: str, rung: int) -> dict[str, Any]:
    """Measures one rung and returns its line.

    Args:
        options: Options of the command.
        folder: Folder with the model.
        rung: Number of levers to use, from the first.
    """
    torch.set_num_threads(options.threads)
    levers = Levers(*(index < rung for index in range(len(Levers._fields))))
    data = FireflyDataModule(folder, train_files=options.rows, batch_size=options.batch_size)
    data.prepare_data()
    data.setup("fit")
    batches = make_batches(data, options.steps + 1, levers)
    model = BloomForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-5, weight_decay=0.0, fused=levers.optimizer or None)
    step = make_step(model, optimizer, levers)
    loss = step(batches[0])
    began = time.perf_counter()
    for batch in batches[1:]:
        loss = step(batch)
    seconds, peak = time.perf_counter() - began, peak_gb()
    with Counted() as counted:
        for batch in batches[1:]:
            step(batch)
    dtype = "bf16" if levers.bf16 else "fp32"
    predicted = counted.flops / product_rate(dtype) + counted.bytes / copy_rate()
    tokens = sum(sum(batch["row_lengths"]) for batch in batches[1:])
    sizes = options.hidden, options.layers, model.config.vocab_size, dtype
    floor = sum(matrix_products(sum(batch["row_lengths"]), len(batch["target_ids"]), *sizes) for batch in batches[1:])
    return {
        "rung": list(NAMES.values())[rung], "tokens_per_second": round(tokens / seconds, 1),
        "measured": round(1000 * seconds / tokens, 3), "predicted": round(1000 * predicted / tokens, 3),
        "tflop": round(1000 * counted.flops / tokens / 1e12, 3), "gb_moved": round(counted.bytes / tokens / 1e6, 2),
        "peak_rss_gb": peak, "share_of_floor": round(floor / seconds, 3), "loss": round(loss, 4),
    }  # fmt: skip


def make_batches(data: FireflyDataModule, steps: int, levers: Levers) -> list[Any]:
    """Makes a micro-batch of the rows of each of the first steps; without packing, padding is computed like tokens."""
    rows = np.concatenate([data.train[step]["rows"].numpy() for step in range(steps)])
    if levers.grouped:
        groups = np.array_split(rows[np.argsort(data.train.plan.lengths[rows], kind="stable")], steps)
        rows = np.concatenate([groups[index] for index in np.random.default_rng(0).permutation(steps)])
    batches = []
    for part in np.array_split(rows, steps):
        batch: Any = collate([data.train.rows[int(row)] for row in part], data.train.pad_id)
        batch["row_lengths"] = batch["lengths"]
        if not levers.packed:
            count, longest = batch["input_ids"].shape
            batch["lengths"], batch["packed_targets"] = [longest] * count, batch["target_positions"]
            batch["token_positions"] = torch.arange(count * longest)
        batches.append(batch)
    return batches


def make_step(model: BloomForCausalLM, optimizer: torch.optim.Optimizer, levers: Levers) -> Any:
    """A function that makes a whole optimizer step from a batch and returns its loss."""
    fast = FastBloom(model) if levers.fused else None

    def summed(batch: Any) -> Tensor:
        if fast is not None:
            return fast.target_loss(batch)
        hidden = model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        hidden = hidden.flatten(0, 1)
        if not levers.targets:
            logits = model.lm_head(hidden).float()
            labels = torch.full((len(logits),), -100).index_copy(0, batch["target_positions"], batch["target_ids"])
            return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        hidden = hidden.index_select(0, batch["target_positions"])
        if levers.chunks:
            return fused_target_cross_entropy(hidden, model.lm_head.weight, batch["target_ids"])
        return target_cross_entropy(hidden, model.lm_head, batch["target_ids"])

    def step(batch: Any) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=levers.bf16):
            loss = summed(batch) / len(batch["target_ids"])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products, and the bytes of all other operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "flash_attention_for_cpu" in str(func):  # PyTorch's registry lacks it
            *_, rows, length, width = args[1].shape if "backward" in str(func) else args[0].shape
            batch = args[0].shape[0]
            self.flops += (10 if "backward" in str(func) else 4) * batch * rows * length * length * width
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif not func.is_view:
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draws measured and predicted seconds of each rung as bars."""
    figure = Figure(figsize=(9, 1.5 + 0.5 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(lines))
    for offset, key, color in ((-0.2, "measured", BLUE), (0.2, "predicted", GREY)):
        bars = axes.barh(places + offset, [line[key] for line in lines], 0.38, color=color, label=key)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(places, [line["rung"] for line in lines])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds for 1,000 tokens")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
