"""Kills a run again and again, and resumes it: python -m benchmarks.kill_and_resume --help.

The run saves after every step. It is killed with SIGKILL at random moments, every second time while a checkpoint is
being written, and is started again by the same command, with ``--ckpt_path auto``. In the end, its ``metrics.csv`` must
have every step once, in order, with losses that are, to the last digit, those of a run which was never killed, and
TensorBoard must show each of them once. The script prints a JSON line for each kill and one for the whole, and draws
the parts of the run.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.machine import machine
from benchmarks.processes import start_fit
from firefly_lightning.checkpoints.layout import TRAINER_FILE
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.files.atomic import partial_path

PATIENCE = 300
"""Seconds within which a run must have logged a step."""


def main() -> None:
    """Trains once without a kill and once with many, and compares the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120, help="of the run; more than it makes between all kills")
    parser.add_argument("--model", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--rows", default="demo_run/rows/*.jsonl", help="instruction rows to train on")
    parser.add_argument("--longest", type=float, default=1.5, help="seconds between a first step and a kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", help="PNG to draw")
    parser.add_argument("--fit", nargs=argparse.REMAINDER, help="more arguments of firefly-fit, such as a strategy")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Run(Path(scratch) / "whole", options), Run(Path(scratch) / "killed", options)
        whole.finish()
        kills = kill_often(killed, options.kills, options.longest, random.Random(options.seed))
        killed.finish()
        result = compare(whole, killed, kills)
    print(json.dumps(result))
    if options.out:
        draw(kills, options.steps, Path(options.out))
    if found := [name for name in ("steps_missing_or_doubled", "losses_that_differ") if result[name]]:
        sys.exit(f"not what the run left that nobody killed: {', '.join(found)}")
    if not result["shown_once_by_tensorboard"]:
        sys.exit("TensorBoard does not show each step once")


class Run:
    """A training run that can be started again and again.

    Args:
        root: Folder of the run.
        options: Options of the command.
    """

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.root, self.last = root, root / "checkpoints" / "last.ckpt"
        self._log = root.with_suffix(".log")
        self._arguments = [
            "fit", "--model.path", options.model, "--data.train_files", options.rows, "--data.max_length", "128",
            "--data.batch_size", "8", "--model.warmup_steps", "3", "--model.learning_rate", "1e-3",
            "--trainer.max_steps", str(options.steps), "--checkpoint.every_n_steps", "1", "--ckpt_path", "auto",
            "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
            "--trainer.default_root_dir", str(root), *(options.fit or []),
        ]  # fmt: skip

    def start(self) -> BaseProcess:
        """Starts the run, or goes on with it, in a process group that can be killed as a whole."""
        return start_fit(self._arguments, self._log, {"OMP_NUM_THREADS": "1"})

    def finish(self) -> None:
        """Starts or resumes the run and waits for its end; exits if it fails."""
        process = self.start()
        process.join()
        if process.exitcode:
            sys.exit(f"a run failed:\n{self._log.read_text('utf-8')[-3000:]}")

    def wait_for_steps(self, process: BaseProcess, before: list[tuple[int, str]]) -> None:
        """Waits until a part of the run has logged a step; exits if it does not.

        Args:
            process: The process of the part.
            before: What was logged before it was started.
        """
        end = time.monotonic() + PATIENCE
        while losses_of(self.root)[-1:] == before[-1:]:
            if not process.is_alive() or time.monotonic() > end:
                sys.exit(f"a run did not begin:\n{self._log.read_text('utf-8')[-3000:]}")
            time.sleep(0.01)


def losses_of(root: Path) -> list[tuple[int, str]]:
    """Steps of a run and their losses, digit for digit, in the order of the whole lines of its newest version."""
    file = max(root.glob("lightning_logs/version_*/metrics.csv"), default=None, key=os.path.getmtime)
    lines = file.read_text("utf-8").splitlines(keepends=True) if file else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))  # a kill may cut the last line
    return [(int(row["step"]), row["train_loss"]) for row in rows if row.get("train_loss")]


def shown_by_tensorboard(root: Path) -> list[int]:
    """Steps of a run whose losses TensorBoard shows, sorted."""
    (folder,) = {file.parent for file in root.glob("lightning_logs/version_*/metrics.csv")}
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return sorted(event.step for event in events.Scalars("train_loss"))


def kill_often(run: Run, kills: int, longest: float, chance: random.Random) -> list[dict[str, Any]]:
    """Kills a run again and again, every second time in the middle of a save; returns what was found after each kill.

    Args:
        run: The run, which is started or resumed before each kill.
        kills: Number of kills.
        longest: Seconds from the first step of a part to its kill, at most.
        chance: Draws the moments.
    """
    done: list[dict[str, Any]] = []
    for number in range(kills):
        before, process = losses_of(run.root), run.start()
        run.wait_for_steps(process, before)
        time.sleep(chance.uniform(0, longest))
        if number % 2:
            wait_for_a_save(run.last)
            time.sleep(chance.uniform(0, 0.01))
        assert process.pid is not None  # the process was started
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kill = {
            "kill": number + 1,
            "last_step_logged": losses_of(run.root)[-1][0],
            "during_a_save": is_saving(run.last),
            "resumes_at": load_file(find_checkpoint(str(run.last.parent)) / TRAINER_FILE, "cpu")["global_step"],
        }
        print(json.dumps(kill), flush=True)
        done.append(kill)
    return done


def is_saving(last: Path) -> bool:
    """Whether the last checkpoint is being written, or takes the place of the one before."""
    return partial_path(last).exists() or not last.exists()


def wait_for_a_save(last: Path) -> None:
    """Waits until a checkpoint is being written, which its hidden name shows for some milliseconds only."""
    end = time.monotonic() + PATIENCE
    while not partial_path(last).exists() and time.monotonic() < end:
        pass


def compare(whole: Run, killed: Run, kills: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compares the losses of the killed run with those of the one that nobody killed, step by step."""
    expected, found = losses_of(whole.root), losses_of(killed.root)
    steps = [step for step, _ in expected]
    return {
        "kills": len(kills),
        "during_a_save": sum(kill["during_a_save"] for kill in kills),
        "steps": len(expected),
        "steps_made_again": sum(max(kill["last_step_logged"] + 1 - kill["resumes_at"], 0) for kill in kills),
        "steps_missing_or_doubled": sum((Counter(steps) - Counter(step for step, _ in found)).values())
        + sum((Counter(step for step, _ in found) - Counter(steps)).values()),
        "losses_that_differ": sum(one != other for one, other in zip(expected, found, strict=False)),
        "shown_once_by_tensorboard": shown_by_tensorboard(killed.root) == steps,
    }


def draw(kills: Sequence[dict[str, Any]], steps: int, path: Path) -> None:
    """Draws each part of the run as a bar over its steps, with a mark at each kill, red where it cut a save short."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    starts = [0, *(kill["resumes_at"] for kill in kills)]
    ends = [*(kill["last_step_logged"] + 1 for kill in kills), steps]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axes.barh(number, end - start, left=start, color="tab:blue")
    for during, colour in ((False, "black"), (True, "tab:red")):
        at = [(kill["last_step_logged"] + 1, kill["kill"] - 1) for kill in kills if kill["during_a_save"] == during]
        label = "killed during a save" if during else "killed"
        axes.plot(*zip(*at, strict=True) if at else ([], []), "x", color=colour, label=label)
    axes.set(xlabel="optimizer step", ylabel="part of the run")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
