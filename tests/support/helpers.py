"""Helpers of several tests: they run the real commands, and have modules that record gradients or kill processes."""

import contextlib
import csv
import ctypes
import errno
import fcntl
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import processes
from firefly_lightning import FireflyDataModule, FireflyModule, PreferenceModule
from tests.support.ranks import BIN, bare, lean, run_rank

ROOT = Path(__file__).parents[2]

PATIENCE = 1800
"""Seconds after which a process counts as hanging; enough for a slow machine that compiles what DeepSpeed needs."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(  # also modules that a run imports late, and the engines
    [
        "tests.support.ranks", "pandas", "torch.utils.tensorboard", "matplotlib.figure",
        "matplotlib.backends.backend_agg", "functorch.compile", "torch._inductor.lowering", "torch.utils.cpp_extension",
        "tests.support.engines",
    ]
)  # fmt: skip


def run(*command: object, check: bool = True, process: bool = False, cwd: Path = ROOT, how=None):
    """Runs an installed command as a user would: its entry point in this process or, with ``process``, in its own."""
    name, *args = (str(part) for part in command)
    result = (how or (run_process if process else run_here))(name, args, cwd)
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def run_process(name: str, args: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a command in a process of its own, with one thread.

    Its command line can name modules of the tests and of the folder ``cwd``.
    """
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(BIN / name), *args], capture_output=True, text=True, cwd=cwd, env=os.environ | own, timeout=PATIENCE
    )


def run_forked(name: str, args: list[str], cwd: Path = ROOT, whole: bool = False) -> subprocess.CompletedProcess:
    """Runs a command in as many processes as it has devices, as `torchrun` does, but forked from one with all imports.

    The result has the output of the first process and the errors of all.
    """
    count = int(args[len(args) - args[::-1].index("--trainer.devices")])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder) / f"{stream}{rank}" for stream in ("out", "err")] for rank in range(count)]
        environments = rank_environments(count) if count > 1 else [{}]
        codes = run_to_the_end(
            ([[name, *args]], environment, *paths, cwd, whole)
            for environment, paths in zip(environments, outputs, strict=True)
        )
        out = outputs[0][0].read_text("utf-8", "replace")
        err = "".join(errors.read_text("utf-8", "replace") for _, errors in outputs)
    return subprocess.CompletedProcess([name, *args], codes[0], out, err)


def forked(function: Callable[..., None], *args: object) -> BaseProcess:
    """Starts a process that runs a function of a module, and returns it."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    return process


def wait_for_ends(processes: Iterable[int], seconds: float = 60) -> None:
    """Waits until processes, given by their ids, have ended, whoever started them."""
    end = time.monotonic() + seconds
    while any(map(alive, processes)):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def run_here(name: str, args: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a command's entry point in this process, which saves the seconds of importing torch.

    The environment is restored: engines leave ranks and ports in it, which processes of later tests would use.
    """
    (script,) = entry_points(group="console_scripts", name=name)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *args])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            script.load()()
        except SystemExit as end:
            code = end.code or 0
        finally:  # at its end a command gives signals back to the system, but this process goes on
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess([name, *args], code, out.getvalue(), err.getvalue())


def run_benchmark(name: str, *args: object) -> str:
    """Runs a benchmark in this process, but forks the processes that it measures; returns what it prints."""
    module = importlib.import_module(f"benchmarks.{name}")
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
    ):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [name, *map(str, args)])
        patch.setattr(processes, "CONTEXT", FORKS)
        module.main()
    return out.getvalue()


def json_lines(text: str) -> list[dict]:
    """The JSON lines among what a benchmark prints."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def fit(
    model: Path, rows: Path, root: Path, *args: object, figures: bool = False, check: bool = True, process: bool = False
):
    """Runs `firefly-fit fit` on a CPU; in processes of its own where it has several, or `process` asks for it."""
    common = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.devices", "1"]
    own = ["--model.path", model, "--data.train_files", rows, "--trainer.default_root_dir", root]
    command = bare(["fit", *common, *own, *args])
    how = run_forked if process or "ddp" in args else run_here
    with contextlib.nullcontext() if figures else lean(["fit"]):
        return run("firefly-fit", *command, check=check, how=how)


def run_ranks(world_size: int, *commands: list[object], timeout: float = PATIENCE) -> str:
    """Runs commands one after another in the same processes, as `torchrun` starts them; returns what they print.

    The processes are forked from one that has imported all they need. A command whose name begins with a dash may fail.
    """
    written = [[str(part) for part in command] for command in commands]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        ranks = ((written, environment, output, output, ROOT) for environment in rank_environments(world_size))
        codes = run_to_the_end(ranks, timeout)
        text = output.read_text("utf-8", "replace")
    if any(codes):
        raise AssertionError(f"ranks ended with {codes}:\n{text[-10000:]}")
    return text


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """The environment variables that `torchrun` sets for each rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    return [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_to_the_end(ranks: Iterable[tuple], timeout: float = PATIENCE) -> list[int | None]:
    """Starts processes with these arguments and returns their exit codes; once one fails, the others are ended soon."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for commands, environment, *places in ranks:
        told = {**os.environ, **own, **environment}
        processes.append(forked(run_rank, commands, told, *places))
    end = time.monotonic() + timeout
    while any(one.is_alive() for one in processes) and not any(one.exitcode for one in processes):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    for one in processes:
        one.join(timeout=5)  # long enough for the others to print their errors
        if one.is_alive():
            one.kill()
            one.join()
    return [one.exitcode for one in processes]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def one_line(result) -> str:
    """The error line of a failed command, which must have printed only this one error and no traceback."""
    assert result.returncode not in (0, None), result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, result.stderr
    return lines[0].split(": error: ", 1)[1]


def logits(bloom):
    with torch.no_grad():
        return bloom(torch.arange(40).view(2, 20)).logits


def raised_line(raised) -> str:
    """The message of a caught error, which must be one line of bearable length."""
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def logged(root: Path, name: str = "train_loss", version: int = 0) -> dict[int, str]:
    """Values by step, digit for digit, from the metrics.csv of a run."""
    with (root / "lightning_logs" / f"version_{version}" / "metrics.csv").open() as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


class Records:
    """For modules that write the gradients of every step into the run's folder, before the optimizer sees them."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        grads = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}
        torch.save(grads, Path(self.trainer.default_root_dir) / f"grads-{self.global_step}-{self.global_rank}.pt")


class Recording(Records, FireflyModule):
    """A module that writes down its gradients."""


class RecordingOnPairs(Records, PreferenceModule):
    """The same of pairs."""


class KillsItself:
    """For modules that kill their own process in the middle of a step."""

    def __init__(self, kill_step: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kill_step = kill_step

    def training_step(self, batch, batch_idx):
        if batch["step"] == self.kill_step and batch_idx % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class Killed(KillsItself, FireflyModule):
    """A module that kills its own process in the middle of a step."""


class KilledOnPairs(KillsItself, PreferenceModule):
    """The same of pairs."""


class KilledRank(Killed):
    """A module that kills one of several ranks, and just before leaves a file that shows it."""

    def __init__(self, kill_rank: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kill_rank = kill_rank

    def training_step(self, batch, batch_idx):
        if batch["step"] == self.kill_step and self.global_rank == self.kill_rank:
            (Path(self.trainer.default_root_dir) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return FireflyModule.training_step(self, batch, batch_idx)


class OnAFullDisk(FireflyModule):
    """A module that lets no file grow past 100 kB once training has begun, as on a full disk."""

    def on_train_start(self):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


class StopsEarly:
    """For modules that ask the trainer to stop in the middle of a step, as a time limit does."""

    def __init__(self, stop_step: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop_step = stop_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if batch["step"] == self.stop_step and not batch_idx % 2:
            self.trainer.should_stop = True


class Stopping(StopsEarly, FireflyModule):
    """A module that asks the trainer to stop in the middle of a step."""


class StoppingOnPairs(StopsEarly, PreferenceModule):
    """The same of pairs."""


class NotingRows(FireflyModule):
    """A module that writes down which rows its rank is given for every step."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        with (Path(self.trainer.default_root_dir) / f"rows-{self.global_rank}.txt").open("a") as file:
            print(batch["step"], *batch["rows"].tolist(), file=file)


class RenamedData(FireflyDataModule):
    """The usual data module, under a class name that no checkpoint knows."""


@contextlib.contextmanager
def memory_taken(seconds: float, trims: bool = False) -> Iterator[list[int]]:
    """Measures memory in the background; its list has one number, the bytes at the peak beyond those at the start.

    Args:
        seconds: Time between two measurements.
        trims: Whether to make freed memory not count before each measurement, however small its pieces are.
    """
    give_memory_back()
    before, taken, done = anonymous_memory(), [0], threading.Event()

    def watch():
        while not done.wait(seconds):
            if trims:
                give_memory_back()
            taken[0] = max(taken[0], anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield taken
    finally:
        done.set()
        watcher.join()


def give_memory_back() -> None:
    """Gives freed memory back to the system, now and whenever more is freed, so that it does not count."""
    libc, m_mmap_threshold = ctypes.CDLL(None), -3
    libc.mallopt(m_mmap_threshold, 65536)
    libc.malloc_trim(0)


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file backs; weights that are only mapped do not count."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def share_blocks(monkeypatch) -> list[range]:
    """Imitates a file system that shares blocks of files, as XFS does; the list gets the ranges of bytes to share.

    The bytes are copied instead. Arguments of the call are as in ioctl_ficlonerange(2): a source, a place in it, a size
    and a place in the file, the last three multiples of the block size.
    """
    shared = []

    def clone(file, request, argument):
        assert request == 0x4020940D
        source, start, size, target = struct.unpack("qQQQ", argument)
        if start % 4096 or size % 4096 or target % 4096 or start + size > os.fstat(source).st_size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with Path(f"/proc/self/fd/{file}").open("r+b") as opened:
            opened.seek(target)
            opened.write(os.pread(source, size, start))
        shared.append(range(start, start + size))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    return shared
