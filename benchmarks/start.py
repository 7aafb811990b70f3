"""Measures how long commands take until they show something: python -m benchmarks.start --help.

Every command is started anew, as a user does, and timed until it shows what it is for: its help, the first character of
an answer, or the first step of a training whose token ids are cached. The times are medians of several starts, after
one that does not count, so that the files are in the page cache. Beside them stands the floor: a process that imports
PyTorch, Lightning and transformers and does nothing.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import machine

GOALS = {
    "firefly --help": 0.6, "firefly build --help": 0.6, "firefly clean --help": 0.6, "firefly stats --help": 0.6,
    "firefly prune --help": 0.6, "firefly-fit --help": 3.0, "firefly chat": 5.0, "firefly-fit fit": 8.0,
}  # fmt: skip
"""Seconds that each command should take at most."""

FLOORS = {
    "imports: torch": "import torch",
    "imports: torch, transformers": "import torch; from transformers import BloomForCausalLM",
    "imports: torch, Lightning, transformers": "import torch, lightning; from transformers import BloomForCausalLM",
}
"""Imports that are timed alone: no command that needs them can be faster."""


def main() -> None:
    """Prints a JSON line for each command, with the median and all of its times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo_run/bloom-zh", help="folder of a small Bloom")
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows to train on")
    parser.add_argument("--only", nargs="+", default=[*GOALS, *FLOORS], metavar="COMMAND", help="commands to time")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--warmup", type=int, default=1, help="before them, of which none counts")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    lines = []
    for name, seconds in measured(options):
        line = {"command": name, "seconds": round(median(seconds), 2), "all": [round(one, 2) for one in seconds]}
        lines.append(line | ({"goal": GOALS[name]} if name in GOALS else {}))
        print(json.dumps(lines[-1]), flush=True)
    if options.out:
        draw(lines, options.out)


def measured(options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Yields the name of each command with the seconds of its starts."""
    for name in options.only:
        once = timed(name, options)
        yield name, [once() for _ in range(options.warmup + options.repeats)][options.warmup :]


def timed(name: str, options: argparse.Namespace) -> Callable[[], float]:
    """A function that starts a command anew and returns the seconds until it shows what it is for."""
    if name in FLOORS:
        return partial(until_end, [sys.executable, "-c", FLOORS[name]])
    program, *arguments = name.split()
    command = [str(Path(sys.executable).parent / program), *arguments]
    if name == "firefly chat":
        return partial(until_first_byte, [*command, "--model", options.model, "--prompt", "你好", "--seed", "1"])
    return partial(until_first_step, command, options) if name == "firefly-fit fit" else partial(until_end, command)


def until_end(command: Sequence[str]) -> float:
    """Seconds until a command has ended."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def until_first_byte(command: Sequence[str]) -> float:
    """Seconds until a command has written the first byte of its output."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.kill()
    if not first:
        sys.exit(f"{' '.join(command)}: said nothing")
    return seconds


def until_first_step(command: Sequence[str], options: argparse.Namespace) -> float:
    """Seconds until a training command has logged its first step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--model.path", options.model, "--data.train_files", json.dumps(options.rows), "--data.max_length", "256",
            "--data.val_fraction", "0.02", "--trainer.max_steps", "1000", "--trainer.accelerator", "cpu",
            "--trainer.devices", "1", "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder,
            "--trainer.num_sanity_val_steps", "0",
        ]  # fmt: skip
        logged = Path(folder) / "lightning_logs" / "version_0" / "metrics.csv"
        began = time.perf_counter()
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env={**os.environ})
            while not has_a_step(logged):
                if process.poll() is not None:
                    sys.exit((Path(folder) / "log").read_text("utf-8")[-3000:])
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            process.kill()
            process.wait()
    return seconds


def has_a_step(metrics: Path) -> bool:
    """Whether a run has logged the loss of a step."""
    if not metrics.is_file():
        return False
    with metrics.open(encoding="utf-8") as file:
        return any(row.get("train_loss") for row in csv.DictReader(file))


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws seconds of each command as bars, and the goals as marks."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ["tab:blue" if "goal" in line else "tab:gray" for line in lines]
    bars = axes.barh([line["command"] for line in lines], [line["seconds"] for line in lines], color=colours)
    axes.bar_label(bars, padding=3, zorder=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    goals = [(line["goal"], at) for at, line in enumerate(lines) if "goal" in line]
    axes.plot(*zip(*goals, strict=True), "|", color="tab:red", markersize=16, markeredgewidth=2, label="goal")
    axes.set(xlabel="seconds until it is seen")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
