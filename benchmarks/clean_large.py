"""Measures the memory of cleaning as many rows as fit on a disk: python -m benchmarks.clean_large --help.

Rows are made of real ones as in ``benchmarks.clean --part 12``, then cleaned by the command itself. Memory is looked at
twice a second: that of all processes of the command, a page that several share counted once, without what is cached of
files. It is drawn over the time; the JSON line has the most that there was.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure

from benchmarks.clean import write_rows
from benchmarks.machine import machine

GOAL = 4.0
"""GB that ten million rows may take."""


def main() -> None:
    """Makes the rows, cleans them and draws the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="real rows in Firefly's form")
    parser.add_argument("--count", type=int, default=10_000_000, help="rows to make; of ten million, 20 GB of disk")
    parser.add_argument("--part", type=int, default=12, help="characters of each part that texts are made of")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="disk to work on, where the system's temporary folder is too small")
    parser.add_argument("--out", help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        place = Path(scratch)
        write_rows(place, options)
        line, course = cleaned(options, place)
    print(json.dumps(line))
    if options.out:
        draw(course, Path(options.out))


def cleaned(options: argparse.Namespace, place: Path) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Cleans the rows; returns the figures, and the seconds and GB of each look at the memory."""
    command = [sys.executable, "-c", "from firefly_lightning.tools import main; main()", "clean"]
    command += [
        "--files",
        str(place / "rows" / "*.jsonl"),
        "--out",
        str(place / "kept.jsonl"),
        "--workers",
        str(options.cores),
    ]
    began = time.perf_counter()
    with (place / "log").open("w+", encoding="utf-8") as log:
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            course = [(time.perf_counter() - began, gb) for gb in memory(process)]
        seconds = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            sys.exit(f"firefly clean: exit status {process.returncode}\n{log.read()[-3000:]}")
    return {
        "rows": options.count,
        "kept": sum(1 for _ in (place / "kept.jsonl").open("rb")),
        "seconds": round(seconds, 1),
        "rows_per_second": round(options.count / seconds),
        "memory_gb": round(max(gb for _, gb in course), 2),
    }, course


def memory(process: subprocess.Popen[bytes]) -> Iterator[float]:
    """GB that a process and its descendants hold, twice a second until it ends."""
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            yield sum(anonymous(one.pid) for one in [parent, *parent.children(recursive=True)]) / 1e9
        except psutil.NoSuchProcess:  # has ended meanwhile
            return
        time.sleep(0.5)


def anonymous(pid: int) -> int:
    """Bytes of a process that no file has, a page that several processes share in equal parts; proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def held_to_goal(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold the memory against the goal."""
    return [
        f"{line['memory_gb']} GB for {line['rows']:,} rows, {line['memory_gb'] * 1e9 / line['rows']:.0f} bytes a row "
        f"(goal {GOAL:g} GB for ten million)."
        for line in lines
        if "memory_gb" in line
    ]


def draw(course: Sequence[tuple[float, float]], path: Path) -> None:
    """Draws the memory over the time."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([seconds for seconds, _ in course], [gb for _, gb in course], color="tab:blue")
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
