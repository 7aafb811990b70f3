"""Measures this project beside another checkout of it, by the same scripts: python -m benchmarks.before_after --help.

Each script runs in the one folder and in the other in turns, on the same rows, with the packages of this environment. A
JSON line for each figure has the medians of both, and how many times as fast this checkout is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]

SCRIPTS = {
    "throughput": "--systems firefly --dtypes fp32 bf16 --tokenizer {model} --rows {rows}",
    "lora": "--systems lora --dtypes fp32 bf16 --tokenizer {model} --rows {rows}",
    "pretrain": "--systems firefly --dtypes fp32 bf16 --tokenizer {model} --rows {texts}",
    "preference": "--systems firefly --dtypes fp32 bf16 --batch_size 8 --tokenizer {model} --rows {rows}",
    "answers": "--systems firefly --models 512x8x8 --batch_sizes 16 --tokenizer {model} --rows {rows}",
    "tokenise": "--count 200000 --tokenizer {model} --rows {rows}",
    "build": "--raw {raw}",
    "start": "--repeats 3 --model {model} --rows {rows}",
}
"""Scripts, and what they are given; one that the other checkout lacks is this one's, with the other's package."""

FIGURES = ("tokens_per_second", "rows_per_second", "seconds")
"""What is compared of a line: the first of these that it has."""

PEERS = ("row_by_row", "imports: torch", "imports: torch, transformers", "imports: torch, Lightning, transformers")
"""Lines that are not about this project."""

NOISE = 0.07
"""Share by which two runs of the same code may differ."""


def main() -> None:
    """Runs the scripts in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", default="demo_run/rows/*.jsonl", help="instruction rows")
    parser.add_argument("--texts", default="demo_run/raw/texts.jsonl", help="texts")
    parser.add_argument("--raw", nargs="+", default=["SentimentAnalyze=demo_run/raw/sentiment.jsonl"], help="raw rows")
    parser.add_argument("--model", default="demo_run/bloom-zh", help="folder of a small Bloom")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    lines = []
    for name in options.scripts:
        found: tuple[dict[Any, list[float]], ...] = defaultdict(list), defaultdict(list)
        for _ in range(options.rounds):
            for folder, figures in zip((options.before.resolve(), ROOT), found, strict=True):
                for what, figure in measured(name, folder, options):
                    figures[what].append(figure)
        for what, unit in found[0]:
            before, after = (statistics.median(figures[what, unit]) for figures in found)
            times = before / after if unit == "seconds" else after / before
            line = {"script": name, "what": what, "unit": unit, "rounds": options.rounds}
            lines.append(line | {"before": before, "after": after, "times_as_fast": round(times, 2)})
            print(json.dumps(lines[-1]), flush=True)
    if options.out:
        draw(lines, options.out)


def measured(name: str, folder: Path, options: argparse.Namespace) -> Iterator[tuple[tuple[str, str], float]]:
    """What a script measures in a checkout: its name and unit, and the figure."""
    places = {key: os.path.abspath(getattr(options, key)) for key in ("rows", "texts", "model")}  # noqa: PTH100 - a glob
    raw = [f"{kind}={Path(file).resolve()}" for kind, _, file in (pair.partition("=") for pair in options.raw)]
    given = [part.format(**places) for word in SCRIPTS[name].split() for part in (raw if word == "{raw}" else [word])]
    module = Path("benchmarks", f"{name}.py")
    script = ["-m", f"benchmarks.{name}"] if (folder / module).exists() else [str(ROOT / module)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, *script, *given], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"{name} in {folder}: {run.stderr[-3000:]}")
    for line in (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")):
        names = [str(line[key]) for key in ("command", "system", "model", "dtype") if key in line]
        unit = next((unit for unit in FIGURES if unit in line), None)
        if names and unit and names[0] not in PEERS:
            yield (", ".join(names), unit), float(line[unit])


def compared(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence that says what became slower."""
    figures = [line for line in lines if "times_as_fast" in line]
    slower = [line for line in figures if line["times_as_fast"] < 1 - NOISE]
    named = [f"{line['script']}, {line['what']} ({line['times_as_fast']})" for line in slower]
    return [f"Slower by more than {NOISE:.0%}: {'; '.join(named) or 'nothing'}."]


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws how many times as fast each figure is now."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        [f"{line['script']}: {line['what']}" for line in lines], [line["times_as_fast"] for line in lines],
        color=["tab:blue" if line["times_as_fast"] >= 1 - NOISE else "tab:red" for line in lines],
    )  # fmt: skip
    axes.bar_label(bars, padding=3)
    axes.axvline(1, color="tab:gray", linewidth=1)
    axes.set(xlabel="times as fast as before")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
