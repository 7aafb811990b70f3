"""Measures how many rows a second `firefly build` makes of raw rows: python -m benchmarks.build --help.

Each kind is built from its raw rows, many times over, on all cores; a JSON line for each, and one for all of them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

RAW = [
    "Dictionary=demo_run/raw/dictionary.jsonl",
    "NER=demo_run/raw/ner.jsonl",
    "SentimentAnalyze=demo_run/raw/sentiment.jsonl",
]
"""Kinds of the demo, and their raw rows."""


def main() -> None:
    """Builds one kind after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", nargs="+", default=RAW, metavar="KIND=FILE", help="raw rows; bin/demo makes these")
    parser.add_argument("--count", type=int, default=100_000, help="least number of rows of each kind")
    parser.add_argument("--workers", type=int, help="processes; one for each core by default")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    lines = []
    for pair in options.raw:
        kind, _, file = pair.partition("=")
        lines.append(measure(kind, Path(file), options))
        print(json.dumps(lines[-1]), flush=True)
    rows, seconds = (sum(line[key] for line in lines) for key in ("rows", "seconds"))
    whole = {"system": "all kinds", "rows": rows, "seconds": seconds, "rows_per_second": round(rows / seconds)}
    print(json.dumps(whole))


def measure(kind: str, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Builds the rows of a file, which is repeated as often as it takes."""
    from firefly_lightning.preparation.build import build

    content = file.read_bytes()
    times = -(-options.count // content.count(b"\n"))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "raw.jsonl"), Path(folder, "rows.jsonl")
        source.write_bytes(content * times)
        began = time.perf_counter()
        build(kind=kind, source=[str(source)], out=str(out), workers=options.workers, bad_rows="skip")
        seconds = time.perf_counter() - began
        rows = out.read_bytes().count(b"\n")
    return {"system": kind, "rows": rows, "seconds": round(seconds, 2), "rows_per_second": round(rows / seconds)}


if __name__ == "__main__":
    main()
