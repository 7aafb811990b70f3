"""Compares tokenising of a large file with what a user would run instead: python -m benchmarks.tokenise --help.

The script makes many rows out of real ones, no two the same: clauses change places and every input gets a number of its
own. Each system works in a process of its own and prints a JSON line; the last line compares them.

    row_by_row     datasets.map with a call of the tokenizer for each input and each target, on the first rows only;
                   before firefly and again after it, so that a machine that changes its pace shows
    firefly        FireflyDataModule.prepare_data: rows a second, peak memory, size of the cache
    cached_start   FireflyDataModule once the cache is there, in a new process: seconds to the first batch, in parts
"""

import argparse
import glob
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone

ORDER = ("row_by_row", "firefly", "cached_start", "row_by_row")  # cached_start needs firefly before it


def main() -> None:
    """Makes the rows, then measures one system after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(ORDER), choices=sorted(set(ORDER)), help="in this order")
    parser.add_argument("--rows", default="demo_run/rows/*.jsonl", help="real rows in Firefly's form; of bin/demo")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--count", type=int, default=1_650_000, help="rows to make; as many as Firefly published")
    parser.add_argument("--sample", type=int, default=20_000, help="rows of them for row_by_row")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--folder", help="disk to work on, where the system's temporary folder is too small")
    parser.add_argument("--out", help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        write_rows(Path(scratch), options)
        lines = [run(system, options, Path(scratch)) for system in options.systems]
    result = summary(lines)
    print(json.dumps(result))
    if options.out:
        draw(lines, Path(options.out))
    if not result["same_tokens"]:
        sys.exit("the systems disagree on the tokens of the first rows")


def write_rows(folder: Path, options: argparse.Namespace) -> None:
    """Writes all rows into one file, and the first of them also into a file of their own."""
    sources = sorted(glob.glob(options.rows))  # noqa: PTH207 - may be absolute
    real = [json.loads(line) for source in sources for line in Path(source).read_text("utf-8").splitlines()]
    random.Random(0).shuffle(real)  # so that the first rows are like all
    with ExitStack() as stack:
        names = ("rows.jsonl", "sample.jsonl")
        files = [stack.enter_context((folder / name).open("w", encoding="utf-8")) for name in names]
        for number, row in enumerate(changed(real, options.count)):
            for file in files[: 2 if number < options.sample else 1]:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def changed(real: Sequence[dict[str, str]], count: int) -> Iterator[dict[str, str]]:
    """Yields ``count`` rows made of real ones, whose inputs begin at another clause and have a number in the middle."""
    for number in range(count):
        times, index = divmod(number, len(real))
        row = real[index]
        clauses = re.findall(r"[^，。！？；\n]*[，。！？；\n]|[^，。！？；\n]+", row["input"])
        turn = times % max(len(clauses), 1)
        text = "".join(clauses[turn:] + clauses[:turn])
        middle = len(text) // 2
        yield {**row, "input": f"{text[:middle]}{number}{text[middle:]}"}


def run(system: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures one system in a process of its own; prints and returns its line."""
    line = {"system": system, **alone(RUNS[system], options, scratch)}
    print(json.dumps(line), flush=True)
    return line


def row_by_row(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokenises a row at a time, as the original recipe does; reading the file counts, as it does for firefly."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        given = tokenizer(row["input"], add_special_tokens=False)["input_ids"]
        learned = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
        ids = [start, *given, end, end, *learned, end]
        mask = [0] * (len(given) + 3) + [1] * (len(learned) + 1)
        return {"input_ids": ids[: options.max_length], "target_mask": mask[: options.max_length]}

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        rows = datasets.load_dataset("json", data_files=str(scratch / "sample.jsonl"), split="train", cache_dir=cache)
        encoded = rows.map(encode, remove_columns=rows.column_names)
        seconds = time.perf_counter() - began
        taught = [len(row["input_ids"]) for row in encoded if any(row["target_mask"])]
    return {
        "rows": len(rows),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(rows) / seconds),
        "tokens": sum(taught),
        "peak_rss_gb": peak_gb(),
    }


def firefly(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures what a first run does before it trains: it tokenises the rows and fills the cache."""
    data = data_module(options, scratch)
    began = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - began
    peak = peak_gb()
    data.setup("fit")
    rows = data.train.rows
    cache = sum(file.stat().st_size for file in (scratch / "cache").rglob("*") if file.is_file())
    with pa.memory_map(str(rows.folders[0] / "rows.arrow")) as file:
        lines = pa.ipc.open_file(file).read_all().column("number").to_numpy()
    return {
        "rows": options.count,
        "seconds": round(seconds, 2),
        "rows_per_second": round(options.count / seconds),
        "tokens": int(rows.lengths.sum()),
        "tokens_of_sample": int(rows.lengths[lines <= options.sample].sum()),
        "peak_rss_gb": peak,
        "rows_gb": round((scratch / "rows.jsonl").stat().st_size / 1e9, 3),
        "cache_gb": round(cache / 1e9, 3),
    }


def cached_start(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures what a later run does before it trains: it reads the cache and makes the first batch."""
    began = time.perf_counter()
    data = data_module(options, scratch)
    imported = time.perf_counter()
    data.prepare_data()
    prepared = time.perf_counter()
    data.setup("fit")
    planned = time.perf_counter()
    batch = next(iter(data.train_dataloader()))
    ended = time.perf_counter()
    parts = {"prepare_data": prepared - imported, "setup": planned - prepared, "first_batch": ended - planned}
    return {
        "seconds": round(ended - imported, 2),
        **{name: round(part, 2) for name, part in parts.items()},
        "imports": round(imported - began, 2),
        "rows_in_batch": len(batch["rows"]),
        "peak_rss_gb": peak_gb(),
    }


RUNS = {"row_by_row": row_by_row, "firefly": firefly, "cached_start": cached_start}


def data_module(options: argparse.Namespace, scratch: Path) -> Any:
    """A data module as a user makes it; its imports are part of the time that the caller measures."""
    from firefly_lightning import FireflyDataModule

    return FireflyDataModule(
        options.tokenizer, train_files=str(scratch / "rows.jsonl"), max_length=options.max_length,
        cache_dir=str(scratch / "cache"),
    )  # fmt: skip


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Firefly's speed as a multiple of the better run row by row, and whether the tokens of both are the same."""
    peers = [line for line in lines if line["system"] == "row_by_row"]
    ours = next(line for line in lines if line["system"] == "firefly")
    fastest = max(line["rows_per_second"] for line in peers)
    return {
        "times_as_fast": round(ours["rows_per_second"] / fastest, 2),
        "same_tokens": all(line["tokens"] == ours["tokens_of_sample"] for line in peers),
    }


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws rows a second of each system, and the parts of a start with the cache, as bars."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    rates, parts = figure.subplots(1, 2)
    measured = [line for line in lines if "rows_per_second" in line]
    names = [f"{line['system']} {'(again)' if line in measured[2:] else ''}" for line in measured]
    bars = rates.barh(names, [line["rows_per_second"] for line in measured], color="tab:blue")
    rates.bar_label(bars, padding=3, fmt="{:,.0f}")
    rates.set(xlabel="rows a second")
    start = next(line for line in lines if line["system"] == "cached_start")
    steps = ["imports", "prepare_data", "setup", "first_batch"]
    bars = parts.barh(steps, [start[step] for step in steps], color=["tab:gray", *["tab:blue"] * 3])
    parts.bar_label(bars, padding=3)
    parts.set(xlabel="seconds of a start with the cache")
    for axes in (rates, parts):
        axes.margins(x=0.35)
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
