"""Measures the memory that a run really takes, in a few optimizer steps in processes of their own."""

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

import firefly_lightning
from firefly_lightning.cli import main as firefly_fit
from firefly_lightning.errors import FireflyError

STEPS = 3
"""Optimizer steps to measure: a first, in which optimizer and DDP make what they keep, and two like all later ones."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""Environment variables that make glibc give memory back as it is freed.

By default it keeps freed pieces of up to 32 MB, depending on an order of allocations that has nothing to do with the
model, and these would count as the model's (up to a quarter more)."""


class MemoryMeter(Callback):
    """Writes what a process held before its model was built, and the most that it held until training ended.

    On a CPU this is resident memory, on a GPU memory that PyTorch has allocated.

    Args:
        out: JSON file to write; a dot and the rank are added to its name.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.base = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Measures the base: memory of libraries, data and process group, before the model is built."""
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            _give_back()
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets the peak: proc(5)
            self.base = _status("VmRSS")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes base and peak into the file of this rank."""
        on_gpu = trainer.strategy.root_device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")
        Path(f"{self.out}.{trainer.global_rank}").write_text(json.dumps({"base": self.base, "peak": peak}), "utf-8")


def measure_run(arguments: Sequence[object], processes: int) -> list[dict[str, int]]:
    """Measures the memory of every process of a run of ``STEPS`` steps.

    Args:
        arguments: Arguments of ``firefly-fit fit``.
        processes: Number of processes of the run, all on this machine.

    Returns:
        For each rank, its ``base`` and ``peak`` in bytes.

    Raises:
        FireflyError: If the run ends with an error; the message contains the run's own.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "memory"
        fit = [
            "fit", *arguments, "--trainer.max_steps", STEPS, "--trainer.devices", processes,
            "--trainer.callbacks", f"{MemoryMeter.__module__}.{MemoryMeter.__name__}", "--trainer.callbacks.out", out,
            "--trainer.enable_checkpointing", "false", "--trainer.logger", "false", "--trainer.num_sanity_val_steps", 0,
            "--trainer.limit_val_batches", 0, "--trainer.enable_progress_bar", "false",
            "--trainer.default_root_dir", scratch,
        ]  # fmt: skip
        command = [sys.executable, "-m", __name__, *map(str, fit)]
        with (Path(scratch) / "log").open("w") as log:
            ranks = [
                subprocess.Popen(
                    command, env={**os.environ, **_same_package(), **GIVE_BACK, **own}, stdout=log, stderr=log
                )
                for own in _environments(processes)
            ]
            codes = [rank.wait() for rank in ranks]
        if any(codes):
            lines = (Path(scratch) / "log").read_text("utf-8", "replace").splitlines()
            said = [line for line in lines if "error: " in line] or lines[-1:]
            raise FireflyError(f"the measured run ended with {codes}: {said[0] if said else 'no message'}")
        return [json.loads(Path(f"{out}.{rank}").read_text("utf-8")) for rank in range(processes)]


def _environments(processes: int) -> list[dict[str, str]]:
    """Environment variables of each rank, as ``torchrun`` sets them; none for a single process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return [{**address, **threads, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _same_package() -> dict[str, str]:
    """Environment variables that make a child process import the same copy of this package as this process."""
    here = str(Path(firefly_lightning.__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}


def _give_back() -> None:
    """Makes glibc give back the freed memory that it has kept, which would hide what is taken next."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # another C library
        return


def _status(name: str) -> int:
    """Value of a field of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.argv[0] = "firefly-fit"
    firefly_fit()
