"""What several tests need: running the real commands, and modules that record or kill."""

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from firefly_lightning import FireflyDataModule, FireflyModule

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command: object, check: bool = True, process: bool = False, cwd: Path = ROOT):
    """Runs an installed command as a user would: its entry point here, or, if asked for, a process of its own."""
    name, *args = (str(part) for part in command)
    result = (run_process if process else run_here)(name, args, cwd)
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def run_process(name: str, args: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """One thread a process; the tests' own modules can be named on the command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(BIN / name), *args], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def run_here(name: str, args: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The same without the seconds that importing torch takes."""
    (script,) = entry_points(group="console_scripts", name=name)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *args])
        try:
            script.load()()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess([name, *args], code, out.getvalue(), err.getvalue())


def fit(model: Path, rows: Path, root: Path, *args: object, **kwargs):
    """`firefly-fit fit` on a CPU; in its own processes where the run has several or does not survive."""
    common = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.devices", "1"]
    own = ["--model.path", model, "--data.train_files", rows, "--trainer.default_root_dir", root]
    kwargs.setdefault("process", "ddp" in args)
    return run("firefly-fit", "fit", *common, *own, *args, **kwargs)


def one_line(result) -> str:
    """The error line of a failed command; there must be no other output that looks like one."""
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
    """Step to value, digit for digit, from the metrics.csv of a run."""
    with (root / "lightning_logs" / f"version_{version}" / "metrics.csv").open() as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


class Recording(FireflyModule):
    """Writes the gradients of every step into the run's folder, before the optimizer sees them."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        grads = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}
        torch.save(grads, Path(self.trainer.default_root_dir) / f"grads-{self.global_step}-{self.global_rank}.pt")


class Killed(FireflyModule):
    """Kills its own process in the middle of a step."""

    def __init__(self, kill_step: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kill_step = kill_step

    def training_step(self, batch, batch_idx):
        if batch["step"] == self.kill_step and batch_idx % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class OnAFullDisk(FireflyModule):
    """Lets no file grow past a megabyte once training has begun."""

    def on_train_start(self):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


class Stopping(FireflyModule):
    """Asks the trainer to stop in the middle of a step, as a time limit does."""

    def __init__(self, stop_step: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop_step = stop_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch["step"] == self.stop_step and not batch_idx % 2:
            self.trainer.should_stop = True


class RenamedData(FireflyDataModule):
    """The same, under a name that no checkpoint knows."""
