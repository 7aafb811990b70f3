"""Compares pruning of a large Bloom with what a user would run instead: python -m benchmarks.prune --help.

The script makes a checkpoint in the shape of bloom-7b1 (with fewer layers where disk or memory require it), in shards,
with a real vocabulary, and takes a tokenizer with a part of that vocabulary. Each system in turn prunes the checkpoint
in a process of its own and prints a JSON line: seconds without imports, seconds until everything it wrote is on the
disk, peak memory (pages of mapped files count), and whether the embedding rows that stay and all other weights are the
old ones. The last line of a disk has the ratios.

    firefly     firefly prune --model … --tokenizer … --out …
    linked      the same with --link
    llmpruner   as LLMPruner does: transformers loads the model, a loop over the tokens copies rows of embedding and
                head, transformers saves the model
    copy        shutil copies the checkpoint, which is no pruning: the time that its bytes alone take
    dd          dd copies it past the page cache, two files at a time: the bare pace of the disk
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BloomConfig, BloomModel

from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone

COPIES = ("copy", "dd")
SYSTEMS = ("firefly", "linked", "llmpruner", *COPIES)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMBEDDING = "word_embeddings.weight"


def main() -> None:
    """Makes the checkpoint, then measures each system in a process of its own, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--large", default="demo_run/large-bloom", help="folder with the large tokenizer; of bin/demo")
    parser.add_argument("--small", default="demo_run/bloom-zh", help="folder with the small one; of bin/demo")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=250_880)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--form", choices=("safetensors", "bin"), default="safetensors", help="of the shards")
    parser.add_argument("--shard_gb", type=float, default=5, help="GB in a shard, at most")
    parser.add_argument("--repeats", type=int, default=1, help="times that each system runs")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before every run")
    parser.add_argument(
        "--folders", nargs="+", default=[tempfile.gettempdir()], help="disks to work on, one after another"
    )
    parser.add_argument("--out", help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    lines = []
    for folder in options.folders:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            large = Path(scratch) / "large"
            make_checkpoint(large, options)
            here = [run(system, large, options) for _ in range(options.repeats) for system in options.systems]
        print(json.dumps(summary(here)), flush=True)
        lines += here
    if options.out:
        draw(lines, Path(options.out))
    if not all(line.get("same_weights", True) for line in lines):
        sys.exit("some weights differ from those of the checkpoint")


def make_checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """Makes a checkpoint with the names and shapes that Bloom's authors saved, and numbers that differ by tensor."""
    shutil.copytree(options.large, folder, ignore=lambda _, names: [name for name in names if "token" not in name])
    config = BloomConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, n_layer=options.layers, n_head=options.heads,
        pad_token_id=3, torch_dtype=DTYPES[options.dtype], architectures=["BloomForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in BloomModel(config).state_dict().items()}
    shards: list[dict[str, torch.Size]] = [{}]
    width, room = DTYPES[options.dtype].itemsize, options.shard_gb * 1e9
    for name, shape in shapes.items():
        if shards[-1] and width * sum(map(torch.Size.numel, [*shards[-1].values(), shape])) > room:
            shards.append({})
        shards[-1][name] = shape
    stem = {"safetensors": "model", "bin": "pytorch_model"}[options.form]
    index: dict[str, str] = {}
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(DTYPES[options.dtype])
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{options.form}"
        tensors = {name: numbers(noise, len(index) + at, shape) for at, (name, shape) in enumerate(shard.items())}
        if options.form == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
        flush(folder / file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.{options.form}.index.json").write_text(text, "utf-8")


def numbers(noise: torch.Tensor, start: int, shape: torch.Size) -> torch.Tensor:
    """A tensor of repeated noise, which begins at another place in every tensor; no two rows close together are equal.

    Args:
        noise: Numbers to repeat.
        start: Number of the tensor, which decides where the noise begins.
        shape: Shape of the tensor.
    """
    rolled = noise.roll(-1009 * start)
    # A copy, or torch.save would write the whole noise with each tensor.
    return rolled[: shape.numel()].clone().reshape(shape) if shape.numel() <= len(rolled) else repeated(rolled, shape)


def repeated(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Fills a tensor with noise that is repeated, a few numbers short of whole rows, so that the rows differ."""
    part = noise[: len(noise) - 7]
    tensor = torch.empty(shape.numel(), dtype=noise.dtype)
    for begin in range(0, len(tensor), len(part)):
        tensor[begin : begin + len(part)] = part[: len(tensor) - begin]
    return tensor.reshape(shape)


def run(system: str, large: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one system in a process of its own; prints and returns its line."""
    out = large.parent / "out"
    if options.cold:
        for file in large.iterdir():
            drop_from_cache(file)
    line = alone(measure, system, large, options.small, out)
    began = time.perf_counter()
    for file in out.iterdir():
        flush(file)
    line["seconds_on_disk"] = round(line["seconds"] + time.perf_counter() - began, 2)
    line |= {name: getattr(options, name) for name in ("layers", "dtype", "form", "cold")}
    line |= {"file_system": file_system(large), "read_gb": size_gb(large), "written_gb": size_gb(out)}
    if system not in COPIES:
        line["same_weights"] = same_weights(large, out)
    shutil.rmtree(out)
    print(json.dumps(line), flush=True)
    return line


def measure(system: str, large: Path, small: str, out: Path) -> dict[str, Any]:
    """Prunes in this process and measures time and memory; imports come first and do not count."""
    work: Callable[[str, str, str], object]
    if system in ("firefly", "linked"):
        from firefly_lightning.pruning.command import prune

        def work(large: str, small: str, out: str) -> None:
            prune(large, out, tokenizer=small, link=system == "linked")

    elif system == "llmpruner":
        from transformers.models.bloom import modeling_bloom  # noqa: F401 - or its import would be timed

        work = prune_with_transformers
    else:
        work = {"copy": copy, "dd": copy_directly}[system]
    began = time.perf_counter()
    work(str(large), small, str(out))
    seconds = time.perf_counter() - began
    return {"system": system, "seconds": round(seconds, 2), "peak_rss_gb": peak_gb()}


def copy(large: str, small: str, out: str) -> None:
    """Copies the checkpoint through the page cache, one file after another."""
    shutil.copytree(large, out)


def copy_directly(large: str, small: str, out: str) -> None:
    """Copies the checkpoint past the page cache, as fast as a disk can read and write at once."""
    Path(out).mkdir()

    def dd(file: Path) -> None:
        command = ["dd", f"if={file}", f"of={Path(out) / file.name}", "bs=16M", "iflag=direct", "oflag=direct"]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(dd, sorted(Path(large).iterdir())))


def prune_with_transformers(large: str, small: str, out: str) -> None:
    """Prunes step by step as the BloomVocabularyPruner of LLMPruner does.

    Source: https://github.com/yangjianxin1/LLMPruner, pruners/vocabulary_pruner.py of 2023.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    Path(out).mkdir(parents=True, exist_ok=True)
    new_tokenizer, old_tokenizer = AutoTokenizer.from_pretrained(small), AutoTokenizer.from_pretrained(large)
    new_ids, old_ids = new_tokenizer.get_vocab(), old_tokenizer.get_vocab()
    old_of_new = {number: old_ids[token] for token, number in new_ids.items()}
    model = AutoModelForCausalLM.from_pretrained(large, torch_dtype="auto")
    tokens, hidden = len(new_tokenizer), model.config.hidden_size
    embedding = torch.nn.Embedding(tokens, hidden, dtype=model.dtype)
    head = torch.nn.Linear(hidden, tokens, bias=False, dtype=model.dtype)
    for new, old in old_of_new.items():
        embedding.weight.data[new] = model.transformer.word_embeddings.weight.data[old]
        head.weight.data[new] = model.lm_head.weight.data[old]
    model.transformer.word_embeddings.weight = embedding.weight
    model.lm_head.weight = head.weight
    model.config.vocab_size = tokens
    model.save_pretrained(out)
    new_tokenizer.save_pretrained(out)


def same_weights(large: Path, out: Path) -> bool:
    """Whether embedding rows of kept tokens and all other tensors of a pruned checkpoint are bit for bit the old ones.

    Rows are found by the strings of their tokens. The files are read tensor by tensor, by other code than wrote them.
    """
    old, new = (json.loads((folder / "tokenizer.json").read_text("utf-8")) for folder in (large, out))
    ids = [
        {**part["model"]["vocab"], **{one["content"]: one["id"] for one in part["added_tokens"]}} for part in (old, new)
    ]
    rows = torch.tensor([ids[0][token] for token in sorted(ids[1], key=ids[1].__getitem__)])
    written = {name.removeprefix("transformer."): read for name, read in readers(out)}
    for name, read in readers(large):
        expected, found = read(), written[name]()
        if not torch.equal(bits(expected[rows] if name == EMBEDDING else expected), bits(found)):
            return False
    return True


def readers(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yields the name of each tensor in a folder, with a function that reads it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        yield from ((name, lambda path=path, name=name: read_tensor(path, name)) for name in names)  # type: ignore[misc]
    for path in sorted(folder.glob("*.bin")):
        tensors = torch.load(path, mmap=True, weights_only=True)
        yield from ((name, lambda tensors=tensors, name=name: tensors[name]) for name in tensors)  # type: ignore[misc]


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Reads a tensor through a mapping of its own, whose pages are given back when the tensor is freed."""
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers, which are equal exactly where the bytes are, for NaN too."""
    return tensor.contiguous().view(torch.int16)


def flush(file: Path) -> None:
    """Waits until a file is written to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def drop_from_cache(file: Path) -> None:
    """Drops a file from the page cache, so that the next reader reads it from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def file_system(path: Path) -> str:
    """Type of the file system that a path is on."""
    command = ["df", "--output=fstype", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def size_gb(folder: Path) -> float:
    """Size of all files of a folder in GB, also of those that share their blocks on the disk with other files."""
    return round(sum(file.stat().st_size for file in folder.iterdir()) / 1e9, 6)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of each system on a disk, and how many times as long as firefly each takes."""
    medians = {system: median(lines, system, "seconds") for system in SYSTEMS if median(lines, system, "seconds")}
    ours = medians.get("firefly", 0.0)
    times = {system: round(seconds / ours, 2) for system, seconds in medians.items() if ours and system != "firefly"}
    return {"of": lines[0]["file_system"], "seconds": medians, "times_as_long": times}


def median(lines: list[dict[str, Any]], system: str, key: str) -> float:
    """Median of a value over one system's runs; 0 where it has no runs."""
    found = [float(line[key]) for line in lines if line["system"] == system]
    return round(statistics.median(found), 2) if found else 0.0


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws seconds and peak memory of each system as bars."""
    disks = list(dict.fromkeys(line["file_system"] for line in lines))
    here = {disk: [line for line in lines if line["file_system"] == disk] for disk in disks}
    bars = [(disk, system) for disk in disks for system in SYSTEMS if median(here[disk], system, "seconds")]
    figure = Figure(figsize=(8, 1 + 0.4 * len(bars)), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("seconds", "peak_rss_gb"), ("seconds", "peak GB"), strict=True):
        values = [median(here[disk], system, key) for disk, system in bars]
        colors = [f"C{disks.index(disk)}" for disk, _ in bars]
        axes.bar_label(axes.barh([f"{system}, {disk}" for disk, system in bars], values, color=colors), padding=3)
        axes.margins(x=0.25)
        axes.set_xlabel(label)
        axes.invert_yaxis()
    first = lines[0]
    figure.suptitle(
        f"Pruning {first['read_gb']:.1f} GB in {first['form']} shards, {first['layers']} layers, {first['dtype']}"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
