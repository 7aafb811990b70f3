"""Measures the bytes of tensors that a process holds under each strategy: python -m benchmarks.strategy_memory --help.

The script trains a random Bloom of about 100 million parameters on two processes for five steps with each strategy.
Bytes held before the first step count as weights; bytes held beyond these between two later steps count as optimizer
states; bytes held beyond both just before a later step of the optimizer count as gradients. Every storage counts once,
and activations are freed by then. The least of the later steps counts, since a collective may still hold tensors when
its step ends.

DeepSpeed holds more here than it promises in fp32: stages 1 and 2 keep a second copy of a process's share of the
weights (which would be the float32 master of half-precision weights), and every stage makes its buffers for gradients
before the first step, so that they count as weights here.
"""

import argparse
import gc
import json
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.machine import machine, peak_gb
from benchmarks.processes import start_fit
from firefly_lightning.huggingface import load_tokenizer

# Promised bytes a parameter on each of two processes in fp32: weights, gradients, optimizer states. Sources:
# Rajbhandari et al. 2020 (ZeRO), where a stage splits states, then gradients, then weights; Zhao et al. 2023 (FSDP).
PROMISED = {
    "ddp": (4, 4, 8),
    "zero1": (4, 4, 4),
    "zero2": (4, 2, 4),
    "zero3": (2, 2, 4),
    "zero2_offload": (4, 2, 4),
    "zero3_offload": (2, 2, 4),
    "gemini": (2, 2, 4),
    "gemini_offload": (2, 2, 4),
    "tensor_parallel": (2, 2, 4),
    "fsdp2": (2, 2, 4),
    "native_tp": (2, 2, 4),
}


OFFLOAD = {"zero2_offload": ["optimizer"], "zero3_offload": ["optimizer", "parameters"]}
BUCKET = 2_000_000
"""Numbers in DeepSpeed's buffers for communication; their size is fixed, by default for a model twice as large."""


class HeldTensors(Callback):
    """Measures the bytes that this process holds, and writes them as JSON when training ends.

    Args:
        out: File to write; a dot and the rank are added to its name.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.held: dict[str, int] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures what is held before the first step: weights, with the master copy where the engine keeps one."""
        self._measure(trainer, "start")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measures what is held before a later optimizer step: weights, states of the optimizer and gradients."""
        if trainer.global_step:
            self._measure(trainer, "before_step")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        """Measures what is held between steps after the first, in which most optimizers make their states."""
        pl_module.zero_grad()
        if trainer.global_step:
            self._measure(trainer, "between")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what was measured into the file of this rank."""
        self.held["peak_rss"] = int(peak_gb() * 1e9)
        Path(f"{self.out}.{trainer.global_rank}").write_text(json.dumps(self.held), "utf-8")

    def _measure(self, trainer: L.Trainer, name: str) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        known = [*trainer.lightning_module.parameters(), *(one for group in groups for one in group["params"])]
        held = held_bytes(known)
        self.held[name] = min(self.held.get(name, held), held)


def held_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages that a tensor of this process refers to, each counted once.

    Args:
        parameters: Parameters whose gradients count too; Python sees a gradient only once it was asked for.
    """
    gradients = [parameter.grad for parameter in parameters]
    gc.collect()
    storages = {}
    for item in [*gradients, *gc.get_objects()]:
        if not issubclass(type(item), torch.Tensor):
            continue
        local = getattr(item, "_local_tensor", item)  # the part of a DTensor, whose whole is nowhere in memory
        if local.device.type != "meta":
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def main() -> None:
    """Measures each strategy in processes of its own, prints a JSON line for each, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(PROMISED), choices=list(PROMISED))
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--rows", default="demo_run/rows/Dictionary.jsonl", help="instruction rows to train on")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--max_length", type=int, default=32, help="tokens of a row that are kept")
    options = parser.parse_args()
    print(json.dumps(machine()))
    with tempfile.TemporaryDirectory() as scratch:
        parameters = make_model(Path(scratch) / "model", options)
        results = {}
        for strategy in options.strategies:
            results[strategy] = measure(strategy, Path(scratch), options)
            print(json.dumps({"strategy": strategy, "parameters": parameters, "ranks": results[strategy]}), flush=True)
    Console(width=140).print(table(results, parameters))


def make_model(folder: Path, options: argparse.Namespace) -> int:
    """Makes a folder of a model without weights, which training draws; returns the number of its parameters."""
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.save_pretrained(folder)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, n_layer=options.layers, n_head=options.hidden // 64
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BloomForCausalLM(config).parameters())


def measure(strategy: str, scratch: Path, options: argparse.Namespace, processes: int = 2) -> list[dict[str, int]]:
    """Trains with a strategy; returns bytes of weights, gradients, optimizer states and peak memory for each rank."""
    out = scratch / strategy
    fit = [
        "fit", "--model.path", scratch / "model", "--model.from_scratch", "true", "--data.train_files", options.rows,
        "--data.batch_size", 2 * processes, "--data.max_length", options.max_length, "--trainer.max_steps", 5,
        "--trainer.devices", processes, "--trainer.accelerator", "cpu", *chosen(strategy),
        "--trainer.enable_checkpointing", "false", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", scratch / "run",
        "--trainer.callbacks", "benchmarks.strategy_memory.HeldTensors", "--trainer.callbacks.out", out,
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    log = scratch / f"{strategy}.log"
    ranks = [
        start_fit([*map(str, fit)], log, address | {"NODE_RANK": "0", "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    if any(codes):
        sys.exit(f"{strategy}: ended with {codes}\n{log.read_text('utf-8')[-3000:]}")
    held = [json.loads(Path(f"{out}.{rank}").read_text("utf-8")) for rank in range(processes)]
    return [
        {
            "weights": one["start"],
            "gradients": one["before_step"] - one["between"],
            "states": one["between"] - one["start"],
            "peak_rss": one["peak_rss"],
        }
        for one in held
    ]


def chosen(strategy: str) -> list[object]:
    """Arguments of ``firefly-fit`` that choose a strategy; those of DeepSpeed get buckets that fit the model."""
    if not strategy.startswith("zero"):
        return ["--trainer.strategy", strategy]
    sizes = ("reduce_bucket_size", "allgather_bucket_size")
    options = {"stage": strategy[4], **dict.fromkeys(sizes, BUCKET)}
    options |= {f"offload_{what}": "true" for what in OFFLOAD.get(strategy, [])}
    own = [part for name, value in options.items() for part in (f"--trainer.strategy.{name}", value)]
    return ["--trainer.strategy", "firefly_lightning.strategies.ZeroStrategy", *own]


def table(results: dict[str, list[dict[str, int]]], parameters: int) -> Table:
    """A table of the bytes a parameter that the rank with most holds, beside the bytes that are promised."""
    shown = Table(title=f"bytes a parameter and process, {parameters:,} parameters, 2 processes, fp32")
    for column in (
        "strategy",
        "weights",
        "gradients",
        "optimizer states",
        "sum",
        "promised",
        "of ddp's",
        "peak RSS, MB",
    ):
        shown.add_column(column, justify="left" if column == "strategy" else "right")
    parts = {
        name: [max(rank[part] for rank in ranks) / parameters for part in ("weights", "gradients", "states")]
        for name, ranks in results.items()
    }
    for name, ranks in results.items():
        held, rss = sum(parts[name]), max(rank["peak_rss"] for rank in ranks) / 1e6
        promised = PROMISED[name]
        share = f"{held / sum(parts['ddp']):.0%}" if "ddp" in parts else ""
        shown.add_row(
            name, *(f"{part:.2f}" for part in parts[name]), f"{held:.2f}",
            f"{' + '.join(map(str, promised))} = {sum(promised)}", share, f"{rss:,.0f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
