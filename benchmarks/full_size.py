"""Trains Blooms of the published sizes on this machine, each way that fits: python -m benchmarks.full_size --help.

A folder with random weights is made for each size, in bfloat16. Each way is ``firefly-fit`` in a process of its own: it
loads the folder, takes a few steps, saves, and a second process resumes and takes one step more. Memory is resident
memory, with glibc told to give freed memory back. Loading, the steps, saving and resuming have a peak each; that of the
steps is held against what ``firefly plan`` foretells. Beside it runs ``transformers.Trainer`` with ``peft``.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from benchmarks import throughput
from benchmarks.clock import Clock
from benchmarks.floor import matrix_products
from benchmarks.machine import machine, peak_gb, reset_peak
from benchmarks.plan import NO_SIZES
from benchmarks.processes import alone
from firefly_lightning.planning.measuring import GIVE_BACK

SIZES = {"1b4": (2048, 24, 16), "2b6": (2560, 30, 32)}
"""Width, blocks and heads of the published models."""


class Way(NamedTuple):
    """A way to train.

    Attributes:
        precision: Lightning's name of the precision.
        model: Keys of ``model`` in the configuration.
        peer: Whether ``transformers.Trainer`` with ``peft`` trains, and not this project.
    """

    precision: str
    model: dict[str, Any]
    peer: bool = False


ADAFACTOR = {"class_path": "torch.optim.Adafactor", "init_args": {"lr": 1e-4}}
WAYS = {
    "full, Adafactor": Way("32-true", {"optimizer": ADAFACTOR}),
    "full, AdamW, 16 bits": Way("bf16-true", {}),
    "LoRA": Way("32-true", {"adapter": "lora"}),
    "LoRA, 16 bits": Way("bf16-true", {"adapter": "lora"}),
    "QLoRA": Way("32-true", {"adapter": "lora", "quantize": "nf4"}),
    "Trainer with peft": Way("32-true", {}, peer=True),
}
CASES = {
    "1b4": ("full, Adafactor", "full, AdamW, 16 bits", "LoRA", "QLoRA", "Trainer with peft"),
    "2b6": ("LoRA", "LoRA, 16 bits", "QLoRA", "Trainer with peft"),
}
"""Ways that are measured by default, by size."""


def main() -> None:
    """Makes a model of each size and measures each way to train it, a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="names, or WIDTHxBLOCKSxHEADS")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="by default those that fit into 24 GiB")
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--vocabulary", type=int, default=46_145, help="tokens; what the tokenizer lacks is made up")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step, which are one micro-batch")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="that are counted")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--out", type=Path, help="PNG of the figures")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    print(json.dumps(machine() | {"threads": options.threads}), flush=True)
    os.environ |= GIVE_BACK
    lines = []
    for size in options.sizes:
        options.hidden, options.layers, options.heads = SIZES.get(size) or map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            options.folder = str(Path(folder) / "model")
            alone(make_model, options)
            for way in options.ways or CASES[size]:
                lines.append({"size": size, "way": way, **measure(Path(folder), WAYS[way], options)})
                print(json.dumps(lines[-1]), flush=True)
    if options.out:
        draw(options.out, lines)


def make_model(options: argparse.Namespace) -> None:
    """Makes the folder of a random Bloom in bfloat16, in which the hub has Bloom."""
    torch.set_default_dtype(torch.bfloat16)
    throughput.make_model(Path(options.folder), options)


def measure(folder: Path, way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, saves and resumes in one way; returns its figures."""
    run, saved, steps = folder / "run.yaml", folder / "saved", options.warmup + options.steps
    run.write_text(yaml.safe_dump(configuration(folder, way, options)), "utf-8")
    dtype = "fp32" if way.precision == "32-true" else "bf16"
    if way.peer:
        found = alone(train_peer, options, dtype)
        seconds = found["tokens"] / found["tokens_per_second"] / options.steps
        own = {"step_seconds": round(seconds, 1), "peak_gb": found["peak_rss_gb"]}
        return own | {name: value for name, value in found.items() if name in FIGURES}
    try:
        found = alone(train, [str(run)], steps, options, saved)
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
        resumed = alone(train, [str(run), "--ckpt_path", str(saved)], steps + 1, options, None)
    finally:
        shutil.rmtree(saved, ignore_errors=True)
    planned = alone(foretell, run, steps)
    tokens = [tokens for tokens, _ in found["counts"][options.warmup :]]
    floor = alone(floor_of, found["counts"][options.warmup :], options, dtype, "adapter" in way.model)
    taken = found["peak_gb"] - found["libraries_gb"]
    kept = ("peak_gb", "libraries_gb", "load_peak_gb", "save_peak_gb", "load_seconds", "save_seconds", "loss")
    return {
        "step_seconds": round(found["seconds"] / options.steps, 1),
        "tokens_per_second": round(sum(tokens) / found["seconds"], 1),
        "share_of_floor": round(floor / found["seconds"], 3),
        "planned_gb": round(planned / 1e9, 2), "taken_gb": round(taken, 2),
        "difference": f"{planned / 1e9 / taken - 1:+.1%}", **{name: found[name] for name in kept},
        "resume_peak_gb": resumed["load_peak_gb"], "resume_seconds": resumed["load_seconds"],
        "checkpoint_mb": round(size / 1e6, 1), "tokens": sum(tokens),
    }  # fmt: skip


FIGURES = ("tokens_per_second", "share_of_floor", "libraries_gb", "loss", "tokens")
"""What is known of ``transformers.Trainer`` too."""


def configuration(folder: Path, way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a run, whose rows of a step are a single micro-batch."""
    return {
        "model": {"path": str(folder / "model"), "warmup_steps": 0, **way.model},
        "data": {"train_files": options.rows, "batch_size": options.batch_size, "max_length": options.max_length},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "precision": way.precision, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "default_root_dir": str(folder),
        },
    }  # fmt: skip


def train(arguments: list[str], steps: int, options: argparse.Namespace, saved: Path | None) -> dict[str, Any]:
    """Trains as ``firefly-fit`` does and saves; returns what :class:`Meter` noted."""
    from firefly_lightning.cli import main

    torch.set_num_threads(options.threads)
    Meter.noted, Meter.clock, Meter.saved = {}, Clock(options.warmup), saved
    metered = ["--trainer.max_steps", str(steps), "--trainer.callbacks", f"{Meter.__module__}.{Meter.__name__}"]
    sys.argv = ["firefly-fit", "fit", "--config", *arguments, *metered]
    main()
    return {**Meter.noted, "seconds": Meter.clock.seconds, "counts": Meter.clock.counts}


class Meter(Callback):
    """Notes seconds and memory of loading, of the steps and of saving, each with a peak of its own."""

    noted: dict[str, Any]
    clock: Clock
    saved: Path | None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Notes what libraries and rows take, before the model is there."""
        reset_peak()
        self.noted["libraries_gb"] = peak_gb()
        self._began = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes what loading took, the checkpoint of a resumed run included."""
        self.noted["load_seconds"] = round(time.perf_counter() - self._began, 1)
        self.noted["load_peak_gb"] = peak_gb()
        reset_peak()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Tells the clock; the batch is the last argument but one."""
        batch = arguments[3]
        self.clock.counts.append((sum(batch["lengths"]), len(batch["target_ids"])))
        self.clock.step_ended()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the peak of the steps, and saves."""
        self.noted |= {"peak_gb": peak_gb(), "loss": round(float(trainer.callback_metrics["train_loss"]), 4)}
        if self.saved:
            reset_peak()
            began = time.perf_counter()
            trainer.save_checkpoint(self.saved)
            self.noted |= {"save_seconds": round(time.perf_counter() - began, 1), "save_peak_gb": peak_gb()}


def train_peer(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Trains an adapter with ``transformers.Trainer`` and ``peft`` on the rows of the same steps."""
    return throughput.measure(options, "peft", dtype, throughput.rows_of_steps(options))


def foretell(run: Path, steps: int) -> float:
    """Bytes that ``firefly plan`` foretells of the steps, beside libraries and rows."""
    from firefly_lightning.planning.comparing import foretold
    from firefly_lightning.planning.request import read_settings

    settings = read_settings([str(run)], None, NO_SIZES, None, None)
    return foretold(settings, steps, "auto", 1, settings.batch_size)


def floor_of(counts: Sequence[tuple[int, int]], options: argparse.Namespace, dtype: str, frozen: bool) -> float:
    """Seconds of the bare matrix products of steps with these tokens and learned tokens."""
    torch.set_num_threads(options.threads)
    sizes = options.hidden, options.layers, options.vocabulary
    return sum(matrix_products(*each, *sizes, dtype, frozen) for each in counts)


GOALS = {("1b4", "full"): 20, ("2b6", "LoRA"): 16, ("2b6", "QLoRA"): 10}
"""GiB of resident memory that a way should take at most, by size and the first word of the way."""


def held_to_goals(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold the peaks against the goals, and the plan against what was taken."""
    remarks = []
    for line in lines:
        goal = GOALS.get((line.get("size", ""), line.get("way", "").partition(" ")[0].rstrip(",")))
        if goal:
            peak = max(value for name, value in line.items() if name.endswith("peak_gb")) * 1e9 / 2**30
            remarks.append(f"{line['size']}, {line['way']}: {peak:.1f} GiB at the most (goal {goal}).")
    planned = [abs(float(line["difference"].rstrip("%"))) for line in lines if "difference" in line]
    if planned:
        remarks.append(f"The plan differs from what was taken by {max(planned):.1f}% at the most (goal 10%).")
    return remarks


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draws memory, measured and foretold, and speed of each way as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.5 * len(lines)), layout="constrained")
    memory, speed = figure.subplots(1, 2, sharey=True)
    names = [f"{line['size']}: {line['way']}" for line in lines]
    colours = [throughput.GREY if WAYS[line["way"]].peer else throughput.BLUE for line in lines]
    for axes, key, label in ((memory, "peak_gb", "peak memory, GB"), (speed, "tokens_per_second", "tokens/s")):
        axes.bar_label(axes.barh(names, [line[key] for line in lines], color=colours), padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    planned = [(line["planned_gb"] + line["libraries_gb"], at) for at, line in enumerate(lines) if "planned_gb" in line]
    memory.plot(*zip(*planned, strict=True), "|", color="black", markersize=16, label="planned")
    memory.legend(loc="lower right")
    memory.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
