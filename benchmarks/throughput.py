"""Compares tokens a second of training with what a user would run instead: python -m benchmarks.throughput --help.

Every system trains the same random Bloom on the same rows, in a process of its own, and prints a JSON line: real tokens
(no padding) a second, learned tokens a second, peak memory, the loss of the last step, and the share of its time that
the bare matrix products of the same steps take, measured in the same process right afterwards. The first steps do not
count. A process imports only what users of its system would import.

    firefly   FireflyModule and FireflyDataModule under Lightning's Trainer
    frugal    the same, with glibc told by MALLOC_MMAP_THRESHOLD_ to give memory back as it is freed
    trainer   the original recipe: transformers.Trainer, rows padded to the longest, logits at every position
    grouped   the same with rows of like length in a batch
    trl       TRL's SFTTrainer, completions only, rows of like length in a batch
    lora      firefly with an adapter: LoRA of rank 8 on all four linear layers
    peft      trainer with the same adapter, by peft
    joined    trainer on documents, joined to blocks of the greatest length and learned as a whole
"""

import argparse
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from benchmarks.clock import Clock
from benchmarks.floor import DTYPES, matrix_products
from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone

# Lightning, this project, Trainer, TRL and matplotlib are imported where they are used, since every system's process
# imports this module and should have only its own libraries in memory.

OURS = ("firefly", "frugal", "lora")
SYSTEMS = ("firefly", "frugal", "trainer", "grouped", "trl")
ADAPTED = ("lora", "peft")
"""Systems that train an adapter on frozen weights; :mod:`benchmarks.lora` compares them."""
JOINED = ("joined",)
"""Systems that train on documents; :mod:`benchmarks.pretrain` compares them."""
ENVIRONMENTS = {"frugal": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}
"""Environment variables of a system's process, by system."""
PURPOSES = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("adamw", "Optimizer."),
    "loss but for its products": ("log_softmax", "exp_", "gather", "scatter"),
    "gelu": ("gelu",),
    "layer norm": ("layer_norm",),
}
"""Parts of the names of operations, by what the operations are for."""
BLUE, GREY = "#4C78A8", "#BAB0AC"


def main() -> None:
    """Measures each system in a process of its own."""
    options = make_parser(__doc__, SYSTEMS).parse_args()
    with prepared(options) as steps:
        lines = measure_all(options, steps)
        options.steps, options.warmup = 2, 1
        for dtype in options.dtypes if options.profile else ():
            line = alone(measure, options, "firefly", dtype, steps, options.profile / f"profile-{dtype}.txt")
            print(json.dumps({"profiled": dtype} | line["shares_of_time"]), flush=True)
    if options.out:
        draw(options.out, lines)


def make_parser(text: str | None, systems: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of the options of a comparison.

    Args:
        text: Description of the script.
        systems: Systems that are measured by default.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(systems), choices=(*SYSTEMS, *ADAPTED, *JOINED))
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows, or texts")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, help="by default one for 64 of the width")
    parser.add_argument("--vocabulary", type=int, help="tokens; what the tokenizer lacks is made up")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="that are counted")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--attention", default="auto", help="of firefly")
    parser.add_argument("--profile", type=Path, help="folder for where the time of firefly's operations goes")
    parser.add_argument("--out", type=Path, help="PNG of the figures")
    return parser


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[list[list[tuple[list[int], list[bool]]]]]:
    """Prints what machine this is and makes the model in ``options.folder``; gives the rows of the steps."""
    print(json.dumps(machine() | {"threads": options.threads}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        options.folder = folder
        yield rows_of_steps(options)


def measure_all(options: argparse.Namespace, steps: Sequence[Any]) -> list[dict[str, Any]]:
    """Measures each system in each type of numbers, and prints a line for each."""
    lines = []
    for dtype, system in product(options.dtypes, options.systems):
        with mock.patch.dict(os.environ, ENVIRONMENTS.get(system, {})):
            lines.append(alone(measure, options, system, dtype, steps))
        print(json.dumps(lines[-1]), flush=True)
    return lines


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draws the speed and memory of each system as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.4 * len(lines)), layout="constrained")
    names = [f"{line['system']}, {line['dtype']}" for line in lines]
    parts = (("tokens_per_second", "tokens/s"), ("peak_rss_gb", "peak memory, GB"))
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), parts, strict=True):
        values = [line[key] for line in lines]
        axes.bar_label(
            axes.barh(names, values, color=[BLUE if name.startswith(OURS) else GREY for name in names]), padding=3
        )
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Makes a random Bloom with its tokenizer, the same for all systems."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    tokens = len(tokenizer)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(tokens, options.vocabulary or tokens)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, n_layer=options.layers,
        n_head=options.heads or options.hidden // 64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BloomForCausalLM(config).save_pretrained(folder)


def rows_of_steps(options: argparse.Namespace) -> list[list[tuple[list[int], list[bool]]]]:
    """Tokens of each row of each step, and which of them are learned; the cache keeps them for firefly's process."""
    from benchmarks.ours import data_module

    data = data_module(options)
    steps = [data.train[step]["rows"].tolist() for step in range(options.warmup + options.steps)]
    return [
        [(row.input_ids.tolist(), row.target_mask.tolist()) for row in (data.train.rows[number] for number in step)]
        for step in steps
    ]


def measure(
    options: argparse.Namespace, system: str, dtype: str, steps: Sequence[Any], profile_to: Path | None = None
) -> dict[str, Any]:
    """Trains with one system and returns its line; with ``profile_to``, also writes a profile to that file."""
    options.system, options.dtype = system, dtype
    torch.set_num_threads(options.threads)
    run = importlib.import_module(f"benchmarks.{'ours' if system in OURS else 'peers'}").prepare(options, steps)
    clock, before = Clock(options.warmup), peak_gb()
    with torch.profiler.profile() if profile_to else nullcontext() as profiler:
        loss = run(clock)
    peak, seconds = peak_gb(), clock.seconds
    counted = clock.counts[options.warmup :]
    tokens, targets = (sum(counts) for counts in zip(*counted, strict=True))
    config = BloomConfig.from_pretrained(options.folder)
    with torch.device("meta"):
        parameters = BloomForCausalLM(config).num_parameters()
    vocabulary = config.vocab_size
    sizes = options.hidden, options.layers, vocabulary
    on_gpu = {"peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if options.device == "cuda" else {}
    floor = sum(
        matrix_products(*counts, *sizes, options.dtype, system in ADAPTED, options.device) for counts in counted
    )
    return {
        "system": options.system, "dtype": options.dtype, "hidden": options.hidden, "layers": options.layers,
        "vocabulary": vocabulary, "batch_size": options.batch_size, "max_length": options.max_length,
        "steps": options.steps, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1),
        "target_tokens_per_second": round(targets / seconds, 1), "peak_rss_gb": peak,
        "libraries_gb": before, "state_gb": round((4 if system in ADAPTED else 16) * parameters / 1e9, 2),
        "share_of_floor": round(floor / seconds, 3), "loss": round(loss, 4), **on_gpu,
        **({"shares_of_time": profiled(profiler, profile_to)} if profiler and profile_to else {}),
    }  # fmt: skip


def profiled(profiler: torch.profiler.profile, path: Path) -> dict[str, float]:
    """Writes the table of operations; returns the share of the time that each kind of operation takes."""
    operations = profiler.key_averages()
    table = operations.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
    path.write_text(table, "utf-8")
    total = sum(operation.self_cpu_time_total for operation in operations)
    shares = dict.fromkeys((*PURPOSES, "all else"), 0.0)
    for operation in operations:
        purpose = next((name for name, words in PURPOSES.items() if any(w in operation.key for w in words)), "all else")
        shares[purpose] += operation.self_cpu_time_total / total
    return {purpose: round(share, 3) for purpose, share in shares.items()}


if __name__ == "__main__":
    main()
