"""What several tests need: running the real commands, and modules that record or kill."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from firefly_lightning import FireflyModule

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command: object, check: bool = True, env: dict[str, str] | None = None, cwd: Path = ROOT):
    """Runs an installed command as a user would, one thread a process."""
    name, *args = (str(part) for part in command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    result = subprocess.run(
        [str(BIN / name), *args], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def fit(model: Path, rows: Path, root: Path, *args: object, check: bool = True):
    """`firefly-fit fit` on a CPU."""
    common = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.devices", "1"]
    own = ["--model.path", model, "--data.train_files", rows, "--trainer.default_root_dir", root]
    return run("firefly-fit", "fit", *common, *own, *args, check=check)


def one_line(result) -> str:
    """The error line of a failed command; there must be no other output that looks like one."""
    assert result.returncode not in (0, None), result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, result.stderr
    return lines[0].split(": error: ", 1)[1]


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
