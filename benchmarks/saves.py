"""Saves and resumes a model beside the pace of the disk itself: python -m benchmarks.saves --help.

First without a training: weights and both moments of AdamW are saved, and are read into a model and an optimizer that
wait for them, as ``firefly-fit`` does, in processes of their own and with nothing of the files in the cache of pages.
Beside it ``dd`` moves as many bytes: past the cache of pages, and through it with a flush at the end. Each round has
all of it, since the pace of a disk changes; medians of the rounds are printed, a JSON line for each.

Then ``firefly-fit`` trains, with saves that it waits for and with ``checkpoint.asynchronous``: how long each save keeps
the training from its next step, and what steps take beside a write.

Longer than 300 lines, since all of it is one measurement in rounds.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import nn

from benchmarks import throughput
from benchmarks.machine import machine
from benchmarks.processes import CONTEXT, alone, print_to

FIRST = {
    "pytorch-lightning_version": L.__version__,
    "global_step": 1,
    "epoch": 0,
    "loops": {"fit_loop": {}},
    "callbacks": {},
}
"""What every run saves beside tensors."""


def main() -> None:
    """Measures the disk, saves and resumes in rounds, and then two trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2048x6x16", help="WIDTHxBLOCKSxHEADS; 2048x24x16 is 1b4")
    parser.add_argument("--vocabulary", type=int, default=46_145, help="tokens")
    parser.add_argument("--processes", type=int, default=2, help="that resume together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, default=Path.cwd(), help="folder on the disk to measure")
    parser.add_argument("--steps", type=int, default=12, help="of a training, which saves after each third of them")
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="not used: there is no figure")
    options = parser.parse_args()
    options.hidden, options.layers, options.heads = map(int, options.size.split("x"))
    print(json.dumps(machine() | {"threads": options.threads, "size": options.size}), flush=True)
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        rounds = []
        for number in range(options.rounds):
            rounds.append(one_round(Path(folder), options))
            seconds = {what: round(took, 2) for what, (_, took) in rounds[-1].items()}
            print(json.dumps({"round": number + 1, "seconds": seconds}), flush=True)
        for what in rounds[0]:
            print(json.dumps(median(what, rounds)), flush=True)
        if options.steps:
            for line in trainings(Path(folder), options):
                print(json.dumps(line), flush=True)


def one_round(folder: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Bytes and seconds of each thing that is measured, by its name."""
    saved = folder / "saved"
    found = dict[str, tuple[float, float]]()
    for asynchronous in (False, True):
        took = alone(save, saved, options, asynchronous)
        size = sum(file.stat().st_size for file in saved.iterdir())
        name = "save beside a training" if asynchronous else "save"
        found |= {name: (size, took["stands_still"]), f"{name}, whole": (size, took["whole"])}
        if asynchronous:
            found[f"{name}, its first"] = (size, took["first"])
            continue
        blocks = size // 2**20
        for way, flags in (("past the cache", ["oflag=direct"]), ("flushed", ["conv=fsync"])):
            found[f"dd, {way}"] = (blocks * 2**20, dd("/dev/zero", folder / "zeros", blocks, *flags))
        found["dd, read past the cache"] = (
            blocks * 2**20,
            dd(folder / "zeros", "/dev/null", blocks, "iflag=direct"),
        )
        (folder / "zeros").unlink()
        for count in dict.fromkeys((1, options.processes)):
            found[f"resume, {count} processes"] = (size, max(resumed(saved, options, count)))
    return found


def median(what: str, rounds: Sequence[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """The line of one thing: its seconds, and its pace as a share of what ``dd`` did past the cache, by medians."""
    disk = "dd, read past the cache" if "resume" in what or "read" in what else "dd, past the cache"
    pace = [one[what][0] / one[what][1] for one in rounds]
    share = [one[what][0] / one[what][1] / (one[disk][0] / one[disk][1]) for one in rounds]
    seconds = [one[what][1] for one in rounds]
    return {
        "what": what,
        "gb": round(rounds[0][what][0] / 1e9, 2),
        "seconds": round(statistics.median(seconds), 2),
        "gb_per_second": round(statistics.median(pace) / 1e9, 2),
        "of_disk": round(statistics.median(share), 2),
    }


def dd(source: Path | str, target: Path | str, blocks: int, *flags: str) -> float:
    """Seconds that ``dd`` takes for so many MiB, 16 at a time."""
    command = ["dd", f"if={source}", f"of={target}", "bs=16M", f"count={-(-blocks // 16)}", *flags]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def save(path: Path, options: argparse.Namespace, asynchronous: bool) -> dict[str, float]:
    """Seconds until the caller goes on, and until all is whole; of two saves where the first makes room for copies."""
    from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
    from firefly_lightning.checkpoints.unsharded import keep_states

    torch.set_num_threads(options.threads)
    module, optimizer = made(options)
    for parameter in module.parameters():
        states = {name: torch.empty_like(parameter).copy_(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **states}
    checkpoint = {**FIRST, "state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    keep_states(checkpoint, module, [optimizer], True)
    io = AtomicCheckpointIO(asynchronous=asynchronous)
    found = {}
    for name in ("first", "stands_still") if asynchronous else ("stands_still",):
        began = time.perf_counter()
        io.save_checkpoint(checkpoint, path)
        found[name] = time.perf_counter() - began
        io.saves.wait()
        found["whole"] = time.perf_counter() - began
    return found


def made(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A Bloom in a module, with weights of any value, and AdamW without states."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, n_layer=options.layers, n_head=options.heads
    )
    module = nn.Module()
    with torch.device("meta"):
        bloom = BloomForCausalLM(config)
    bloom.to_empty(device="cpu").tie_weights()
    module.add_module("model", bloom)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_()
    return module, torch.optim.AdamW(module.parameters())


def resumed(path: Path, options: argparse.Namespace, count: int) -> list[float]:
    """Seconds in which each of some processes has resumed, all at once."""
    for file in path.iterdir():
        drop(file)
    if count == 1:
        return [alone(resume, path, options)]
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = [(rank, count, folder) for rank in range(count)]
        processes = [CONTEXT.Process(target=resume_together, args=(path, options, *own)) for own in rendezvous]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                sys.exit((Path(folder) / "log").read_text("utf-8"))
        return [float((Path(folder) / f"seconds-{rank}").read_text("utf-8")) for rank in range(count)]


def resume_together(path: Path, options: argparse.Namespace, rank: int, count: int, folder: str) -> None:
    """Resumes as one of several processes, and writes down how long it took."""
    print_to(str(Path(folder) / "log"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    (Path(folder) / f"seconds-{rank}").write_text(str(resume(path, options)), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def resume(path: Path, options: argparse.Namespace) -> float:
    """Seconds until weights and optimizer are those of a checkpoint."""
    from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
    from firefly_lightning.checkpoints.unsharded import accept_names

    torch.set_num_threads(options.threads)
    module, optimizer = made(options)
    accept_names(module, optimizer)
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    read = AtomicCheckpointIO().load_checkpoint(path)
    module.load_state_dict(read["state_dict"])
    optimizer.load_state_dict(read["optimizer_states"][0])
    seconds = time.perf_counter() - began
    assert all(bool(torch.isfinite(state["exp_avg"].sum())) for state in optimizer.state.values())
    return seconds


def drop(file: Path) -> None:
    """Drops the pages of a file from the cache."""
    opened = os.open(file, os.O_RDONLY)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(opened)


def trainings(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of a training that waits for its saves, and of one that does not."""
    options.folder = str(folder / "model")
    alone(make_model, options)
    lines: list[dict[str, Any]] = []
    for asynchronous in (False, True):
        root = folder / f"run-{asynchronous}"
        found = alone(train, options, root, asynchronous)
        with (root / "lightning_logs/version_0/metrics.csv").open() as file:
            losses = [row["train_loss"] for row in csv.DictReader(file) if row["train_loss"]]
        lines.append({"training": "goes on" if asynchronous else "waits", **found, "losses": losses})
    waits, goes_on = lines
    same = waits.pop("losses") == goes_on.pop("losses")
    goes_on["of_synchronous"] = round(goes_on["save_seconds"] / waits["save_seconds"], 3)
    goes_on["first_of_synchronous"] = round(goes_on["first_save_seconds"] / waits["first_save_seconds"], 3)
    return [waits, goes_on | {"same_losses": same}]


def make_model(options: argparse.Namespace) -> None:
    """Makes the folder of a random Bloom."""
    throughput.make_model(Path(options.folder), options)


def train(options: argparse.Namespace, root: Path, asynchronous: bool) -> dict[str, Any]:
    """Trains as ``firefly-fit`` does; returns what :class:`Meter` noted."""
    from firefly_lightning.cli import main as fit

    torch.set_num_threads(options.threads)
    Meter.saves, Meter.steps, Meter.beside = [], [], []
    sys.argv = [
        "firefly-fit", "fit", "--model.path", options.folder, "--data.train_files", json.dumps(options.rows),
        "--data.batch_size", str(options.batch_size), "--data.max_length", str(options.max_length),
        "--model.warmup_steps", "0", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.max_steps", str(options.steps), "--trainer.default_root_dir", str(root),
        "--trainer.enable_progress_bar", "false", "--checkpoint.every_n_steps", str(options.steps // 3),
        "--checkpoint.asynchronous", str(asynchronous).lower(),
        "--trainer.callbacks", f"{Meter.__module__}.{Meter.__name__}",
    ]  # fmt: skip
    fit()
    return {
        "first_save_seconds": round(Meter.saves[0], 2),
        "save_seconds": round(statistics.median(Meter.saves[1:] or Meter.saves), 2),
        "step_seconds": round(statistics.median(Meter.steps), 2),
        "step_seconds_beside_a_write": round(statistics.median(Meter.beside), 2) if Meter.beside else None,
    }


def held_to_goals(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold saves and resumes against the disk, and a save beside a training against one it waits for."""
    shares = {line["what"]: line["of_disk"] for line in lines if "of_disk" in line}
    measured = [name for name in shares if name == "save" or name.startswith("resume")]
    remarks = [f"{name}: {shares[name]:.2f} of the disk's own pace (goal 0.8)." for name in measured]
    for line in (line for line in lines if "of_synchronous" in line):
        remarks.append(
            f"A training stands still for {line['of_synchronous']:.0%} of a save that it waits for (goal 15%), for "
            f"{line['first_of_synchronous']:.0%} at its first save; a step beside a write takes "
            f"{_times(line['step_seconds_beside_a_write'], line['step_seconds'])} as long as another. "
            f"The losses are {'the same' if line['same_losses'] else 'OTHERS'}."
        )
    return remarks


def _times(beside: float | None, alone: float) -> str:
    return f"{beside / alone:.2f} times" if beside else "(none was, since writes were done within a step)"


class Meter(Callback):
    """Notes the seconds that saves keep the training, and those of steps, beside a write and without."""

    saves: list[float]
    steps: list[float]
    beside: list[float]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Has saves measured."""
        save = trainer.save_checkpoint

        def measured(*arguments: Any, **more: Any) -> None:
            began = time.perf_counter()
            save(*arguments, **more)
            self.saves.append(time.perf_counter() - began)

        trainer.save_checkpoint = measured  # type: ignore[method-assign]

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Begins a step."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Ends a step, before anything is saved."""
        saves: Any = trainer.strategy.checkpoint_io
        (self.beside if saves.saves.pending else self.steps).append(time.perf_counter() - self._began)


if __name__ == "__main__":
    main()
