"""Measures how time and memory grow with length, vocabulary and blocks: python -m benchmarks.growth --help.

Each point is a run of :mod:`benchmarks.throughput` in a process of its own, of this project and of the original recipe.
Rows are real texts, joined until they are as long as the length asks for. A step has the same number of tokens at every
length, or a single row where that has more.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from glob import glob
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.machine import machine
from benchmarks.throughput import BLUE, GREY
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.huggingface import load_tokenizer

COLOURS = {"firefly": BLUE, "trainer": GREY}


def main() -> None:
    """Measures every point, prints a JSON line for each, and draws the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[46_145, 250_880])
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--systems", nargs="+", default=list(COLOURS), choices=list(COLOURS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="PNG of the figures")
    options = parser.parse_args()
    print(json.dumps(machine() | {"threads": options.threads, "tokens a step": options.tokens}), flush=True)
    usual = {"max_length": min(options.lengths, key=lambda length: abs(length - 256)), "layers": 8}
    usual["vocabulary"] = options.vocabularies[0]
    axes = {"max_length": options.lengths, "vocabulary": options.vocabularies, "layers": options.layers}
    lines = []
    measured: dict[tuple[int, ...], list[dict[str, Any]]] = {}  # axes share the point at the usual sizes
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in axes.items():
            for value in values:
                sizes = usual | {axis: value}
                key = tuple(sizes.values())
                if key not in measured:
                    measured[key] = point(options, sizes, Path(folder))
                for line in measured[key]:
                    lines.append({"axis": axis, "value": value, **line})
                    print(json.dumps(lines[-1]), flush=True)
    bound = memory_bound(lines, options.hidden)
    print(json.dumps(bound), flush=True)
    if options.out:
        draw(options.out, lines)


def point(options: argparse.Namespace, sizes: dict[str, int], folder: Path) -> list[dict[str, Any]]:
    """Measures speed and memory of each system at some sizes; returns a line for each system.

    Args:
        options: Options of the command.
        sizes: Length of rows, blocks and vocabulary, by name.
        folder: Folder for the files of rows.
    """
    length = sizes["max_length"]
    rows = folder / f"{length}.jsonl"
    if not rows.exists():
        write_long_rows(rows, options, length)
    own: list[object] = ["--rows", rows, "--tokenizer", options.tokenizer, "--hidden", options.hidden]
    own += ["--batch_size", max(1, options.tokens // length), "--threads", options.threads, "--steps", 2, "--warmup", 1]
    own += [part for name, value in sizes.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "benchmarks.throughput", *map(str, own), "--systems", *options.systems]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{sizes}: {done.stderr[-3000:]}")
    keys = ("system", "tokens_per_second", "peak_rss_gb", "libraries_gb", "share_of_floor", "tokens")
    # DeepSpeed prints to standard output too.
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [{key: line[key] for key in keys} for line in lines[1:]]


def write_long_rows(path: Path, options: argparse.Namespace, length: int) -> None:
    """Writes rows of more than ``length`` tokens, half of them input, so that training cuts them to that length."""
    tokenizer = load_tokenizer(options.tokenizer).backend_tokenizer
    files = [file for pattern in options.rows for file in sorted(glob(pattern))]  # noqa: PTH207
    texts = cycle([row.turns[0] for file in files for row in islice(read_rows(file), 5000)])

    def joined(part: int, tokens: int) -> str:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += tokenizer.encode(next(texts)[part]).ids
        text: str = tokenizer.decode(ids[:tokens])
        return text

    count = 4 * max(1, options.tokens // length)
    rows = [{"kind": "all", "input": joined(0, length // 2), "target": joined(1, length)} for _ in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def memory_bound(lines: Sequence[dict[str, Any]], hidden: int) -> dict[str, Any]:
    """Whether memory at the larger vocabulary is within its bound: 1.3 times that at the smaller, plus added weights.

    A larger tokenizer takes memory too, before there is a model. What it adds is shown, but does not count.

    Args:
        lines: Measured lines of all points.
        hidden: Width of the model.
    """
    points = [line for line in lines if line["axis"] == "vocabulary" and line["system"] == "firefly"]
    small, large = points[0], points[-1]
    tokenizer = large["libraries_gb"] - small["libraries_gb"]
    added = (large["value"] - small["value"]) * hidden * 4 * 4 / 1e9  # weight, gradient and two moments in float32
    bound = 1.3 * small["peak_rss_gb"] + added
    return {
        "axis": "memory bound", "vocabularies": [small["value"], large["value"]], "peak_rss_gb": large["peak_rss_gb"],
        "tokenizer_gb": round(tokenizer, 2), "bound_gb": round(bound, 2),
        "holds": large["peak_rss_gb"] - tokenizer <= bound,
    }  # fmt: skip


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draws the seconds for 1,000 tokens and the peak memory along each axis."""
    names = {"max_length": "tokens a row", "vocabulary": "vocabulary", "layers": "blocks"}
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, len(names), sharex="col")
    for column, (axis, label) in enumerate(names.items()):
        for system, colour in COLOURS.items():
            points = [line for line in lines if line["axis"] == axis and line["system"] == system]
            values = [line["value"] for line in points]
            seconds = [1000 / line["tokens_per_second"] for line in points]
            grid[0, column].plot(values, seconds, "o-", color=colour, label=system)
            grid[1, column].plot(values, [line["peak_rss_gb"] for line in points], "o-", color=colour)
        grid[1, column].set_xlabel(label)
        if axis == "max_length":
            for axes in grid[:, column]:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(ScalarFormatter())
        for axes in grid[:, column]:
            axes.set_ylim(0, math.ceil(10 * axes.get_ylim()[1]) / 10)
    grid[0, 0].set_ylabel("seconds for 1,000 tokens")
    grid[1, 0].set_ylabel("peak memory, GB")
    grid[0, 0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
