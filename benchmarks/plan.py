"""Compares the memory that ``firefly plan`` predicts with that of real steps: python -m benchmarks.plan --help.

The script trains random Blooms of three sizes on a CPU, in one process for ``auto`` and two for other strategies. It
compares the growth of a process's resident memory from before its model is built to the highest point of three steps;
libraries and data, 0.5 GB or so, do not count. glibc is told to give memory back as it is freed.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers import BloomConfig

from benchmarks.machine import machine
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.planning.comparing import compare
from firefly_lightning.planning.request import read_settings

NO_SIZES: dict[str, int | None] = dict.fromkeys(("vocab_size", "hidden_size", "n_layer", "n_head"))


def main() -> None:
    """Measures each strategy at each size, prints a JSON line for each, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["auto", "ddp", "zero2", "zero3"])
    parser.add_argument("--sizes", nargs="+", default=["512x8", "768x10", "1024x12"], help="hidden sizes x blocks")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--rows", default="demo_run/rows/SentimentAnalyze.jsonl", help="instruction rows to train on")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a row that are kept")
    options = parser.parse_args()
    print(json.dumps(machine()))
    table = Table(title="MB of a process that its model and training take")
    for column in ("parameters", "strategy", "predicted", "measured", "difference", "beside it"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            hidden, layers = map(int, size.split("x"))
            config = make_run(Path(scratch), hidden, layers, options)
            with contextlib.redirect_stdout(sys.stderr):
                settings = read_settings([str(config)], None, NO_SIZES, options.precision, None)
            for strategy in options.strategies:
                with contextlib.redirect_stdout(sys.stderr):
                    (found,) = compare(settings, [strategy], [1 if strategy == "auto" else 2], None)
                parameters = settings.model.parameters
                print(json.dumps({"parameters": parameters, "precision": options.precision, **found}), flush=True)
                megabytes = (f"{found[name] / 1e6:,.0f}" for name in ("predicted", "measured"))
                difference, base = f"{found['difference']:+.1%}", f"{found['base'] / 1e6:,.0f}"
                table.add_row(f"{parameters:,}", strategy, *megabytes, difference, base)
    Console(width=120).print(table)


def make_run(folder: Path, hidden: int, layers: int, options: argparse.Namespace) -> Path:
    """Writes the folder of a model, whose weights training draws, and a configuration; returns the latter's file."""
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.save_pretrained(folder / "model")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": hidden, "n_layer": layers, "n_head": hidden // 64}
    BloomConfig(**dict[str, Any](sizes)).save_pretrained(folder / "model")
    config = {
        "model": {
            "path": str(folder / "model"),
            "from_scratch": True,
            "gradient_checkpointing": options.checkpointing,
        },
        "data": {
            "train_files": options.rows,
            "batch_size": 2 * options.micro_batch_size,
            "micro_batch_size": options.micro_batch_size,
            "max_length": options.max_length,
        },
        "trainer": {"accelerator": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return folder / "run.yaml"


if __name__ == "__main__":
    main()
