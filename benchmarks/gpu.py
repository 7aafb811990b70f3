"""Everything worth knowing of a GPU the day there is one, in eight minutes: python -m benchmarks.gpu --help.

Needs no network: without ``--rows`` and ``--tokenizer`` it makes words that mean nothing, as long as real rows are.
Each measurement is a process of its own and prints a JSON line; what is missing, or had no time left, is said.

    products     operations a second of bare products, in each type of numbers
    throughput   1b4's shape in bf16-mixed: firefly, transformers.Trainer and TRL, with their memory on the GPU, what
                 firefly plan foretells of it, and the share that bare products take
    profile      what takes firefly's time
    attention    one layer's, with gradients: as training computes it, and by FlexAttention
    tests        all tests that need a GPU
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, throughput
from benchmarks.floor import DTYPES, product_rate
from benchmarks.machine import machine
from benchmarks.processes import alone

PEERS = {"trainer": "transformers", "grouped": "transformers", "trl": "trl"}
"""The systems beside this project, and the package that each needs."""

PACKAGES = ("deepspeed", "colossalai", "trl", "bitsandbytes")
"""Packages without which some tests or measurements are left out."""

PER_TEST = 30
"""Seconds that a test may take before the time is up, in which case it is not begun."""


def main() -> None:
    """Measures one thing after another until the time is up."""
    parser = throughput.make_parser(__doc__, ["firefly", *PEERS])
    parser.set_defaults(
        device="cuda", hidden=2048, layers=24, heads=16, vocabulary=46_145, dtypes=["bf16"], rows=[], tokenizer=""
    )
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing new is begun")
    parser.add_argument("--no_tests", action="store_true", help="measure only")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that this PyTorch can use was found; --device cpu tries the script's own logic")
    out = options.out or Path("gpu")
    out.mkdir(parents=True, exist_ok=True)
    left = Left(options.minutes)
    with (out / "gpu.jsonl").open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as scratch:

        def tell(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps(line), flush=True)

        tell(described(options))
        if not (options.rows and options.tokenizer):
            make_words(Path(scratch), options)
        for dtype in DTYPES:
            size = 8192 if options.device == "cuda" else 512
            rate = alone(product_rate, dtype, options.device, size)
            tell({"products": dtype, "tflop_per_second": round(rate / 1e12, 3)})
        with throughput.prepared(options) as steps:
            compare(options, steps, left, tell, out)
        if not options.no_tests:
            tell(run_tests(left))
        tell({"seconds": round(options.minutes * 60 - left())})


class Left:
    """Seconds that are left, by calling it.

    Args:
        minutes: All the time there is.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def __call__(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()


def described(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, its GPU, and what is missing on it."""
    lacks = [f"no {package}" for package in PACKAGES if importlib.util.find_spec(package) is None]
    if importlib.util.find_spec("liger_kernel") is None:
        lacks.append("no liger_kernel")
    else:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        lacks += [] if "bloom" in MODEL_TYPE_TO_APPLY_LIGER_FN else ["liger_kernel knows no Bloom"]
    if options.device == "cpu":
        return machine() | {"lacks": ["no GPU", *lacks]}
    properties = torch.cuda.get_device_properties(0)
    size = round(properties.total_memory / 1e9, 1)
    card = {"gpu": properties.name, "gpu_gb": size, "gpus": torch.cuda.device_count()}
    return machine() | card | {"lacks": lacks}


def make_words(folder: Path, options: argparse.Namespace) -> None:
    """Makes a tokenizer of words and rows of them, as long as real rows: 57 tokens the median, 120 the mean."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = [*special.values(), *(f"w{number}" for number in range(options.vocabulary - len(special)))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "words")
    chance = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(200 * options.batch_size):
            length = min(max(round(chance.lognormvariate(4.04, 1.22)), 4), options.max_length)
            said = [words[chance.randrange(4, len(words))] for _ in range(length)]
            row = {"kind": "Words", "input": " ".join(said[: length // 2]), "target": " ".join(said[length // 2 :])}
            file.write(json.dumps(row) + "\n")
    options.tokenizer, options.rows = str(folder / "words"), [str(folder / "rows.jsonl")]


def compare(
    options: argparse.Namespace, steps: list[Any], left: Left, tell: Callable[[dict[str, Any]], None], out: Path
) -> None:
    """Trains with each system, as long as there is time, and profiles firefly."""
    slowest = 0.0
    for system in options.systems:
        if system in PEERS and importlib.util.find_spec(PEERS[system]) is None:
            continue  # told among what is missing
        if left() < 2 * slowest:
            tell({"left_out": system, "why": "no time was left"})
            continue
        began = time.monotonic()
        line = alone(throughput.measure, options, system, "bf16", steps)
        slowest = max(slowest, time.monotonic() - began)
        tell(line | ({"planned_gb": round(alone(foretold_bytes, options) / 1e9, 3)} if system == "firefly" else {}))
    if left() > slowest:
        options.steps, options.warmup = 2, 1
        line = alone(throughput.measure, options, "firefly", "bf16", steps, out / "profile-gpu.txt")
        tell({"profiled": "bf16"} | line["shares_of_time"])
    if left() > slowest:
        for line in alone(attention.measure, options, steps, "bf16"):
            tell(line)


def foretold_bytes(options: argparse.Namespace) -> float:
    """Bytes that ``firefly plan`` foretells of firefly's steps on one device."""
    import yaml

    from benchmarks.plan import NO_SIZES
    from firefly_lightning.planning.comparing import foretold
    from firefly_lightning.planning.request import read_settings

    run = {
        "model": {"path": options.folder, "warmup_steps": 0},
        "data": {"train_files": options.rows, "batch_size": options.batch_size, "max_length": options.max_length},
        "trainer": {"accelerator": options.device, "devices": 1, "precision": "bf16-mixed"},
    }
    path = Path(options.folder) / "run.yaml"
    path.write_text(yaml.safe_dump(run), "utf-8")
    settings = read_settings([str(path)], None, NO_SIZES, None, None)
    return foretold(settings, options.warmup + options.steps, "auto", 1, settings.batch_size)


def run_tests(left: Left) -> dict[str, Any]:
    """Runs the tests that need a GPU, as many as there is time for."""
    limit = max(int(left()) - PER_TEST, 1)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ)
    except subprocess.TimeoutExpired as ended:
        said = (ended.stdout or b"").decode(errors="replace").splitlines()
        return {"tests": "no time was left for all", "done": "".join(line.split(" ")[-1] for line in said[:20])}
    lines = run.stdout.strip().splitlines()
    return {"tests": lines[-1] if lines else "", "failed": [line for line in lines if line.startswith("FAILED")]}


if __name__ == "__main__":
    main()
