"""Runs of several processes: on two simulated nodes, started by Lightning itself, and when one of them is killed."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.test_parity import relative
from tests.support.choice import DIVIDED
from tests.support.helpers import BIN, PATIENCE, ROOT, free_port, logged, run_to_the_end

TWO_NODES = Path(__file__).with_name("two_nodes.sh")


def start(*command: object, **environment: str) -> subprocess.Popen:
    """In a process group of its own, so that what it leaves behind can be found."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, **own, **environment}, start_new_session=True,
    )  # fmt: skip


def left_over(group: int) -> list[str]:
    """Command lines of the processes of a group that still run, a moment after the first has ended."""
    end = time.monotonic() + 10
    while (running := running_in(group)) and time.monotonic() < end:
        time.sleep(0.1)  # one that ends is listed until it has ended
    return running


def running_in(group: int) -> list[str]:
    """Command lines of the processes of a group."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=2) for line in listed.splitlines())
    return [row[-1] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


@pytest.fixture
def arguments(fit_args, tmp_path):
    name, *args = fit_args(tmp_path, 1e-4, "--trainer.devices", 1, "--trainer.num_nodes", 2, "--trainer.strategy")
    return [BIN / name, *args]


def losses_are_right(root: Path, expected) -> None:
    losses = [float(loss) for _, loss in sorted(logged(root).items())]
    assert max(map(relative, losses, expected[1e-4].losses)) < 1e-4


def test_two_nodes_train_like_one_process(arguments, expected, tmp_path):
    run = start(TWO_NODES, *arguments, "ddp")
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    assert "MEMBER: 2/2" in output
    losses_are_right(tmp_path, expected)
    assert not left_over(run.pid)


@pytest.mark.parametrize(
    ("strategy", "devices"), [("ddp_spawn", 2), ("ddp_fork", 1), *([] if DIVIDED else [("ddp_fork", 2)])]
)
def test_processes_that_lightning_starts_itself_train_like_one(strategy, devices, fit_args, expected, tmp_path):
    """The first hands its weights to the command that started it, in a file that no run resumes from."""
    name, *args = fit_args(tmp_path, 1e-4, "--trainer.strategy", strategy, "--trainer.devices", devices)
    run = start(BIN / name, *args, "--samples.prompts", "[]")
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    losses_are_right(tmp_path, expected)
    assert (tmp_path / "checkpoints" / "last.ckpt" / "checkpoint.json").is_file()
    assert not left_over(run.pid)


def test_torchrun_starts_two_nodes(arguments, expected, tmp_path):
    places = "--nnodes 2 --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
    torchrun = f"exec torchrun --no-python {places}"
    run = start(TWO_NODES, "bash", "-c", torchrun + ' "$@"', "torchrun", *arguments, "ddp")
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    losses_are_right(tmp_path, expected)
    assert not left_over(run.pid)


def test_slurm_starts_two_tasks(arguments, expected, tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    places = {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": free_port()}
    _, *args = map(str, [*arguments, "ddp", "--trainer.num_nodes", 1, "--trainer.devices", 2])
    output = tmp_path / "output"
    tasks = [job | places | {"SLURM_PROCID": str(at), "SLURM_LOCALID": str(at)} for at in range(2)]
    codes = run_to_the_end(([["firefly-fit", *args]], task, output, output, ROOT) for task in tasks)
    assert codes == [0, 0], output.read_text()
    losses_are_right(tmp_path, expected)


KILLED = ["--model", "tests.support.helpers.KilledRank", "--model.kill_rank", 1, "--model.kill_step", 5]


@pytest.mark.parametrize("nodes", [1] if DIVIDED else [1, 2])
def test_a_killed_rank_stops_the_run_within_a_minute(nodes, arguments, tmp_path):
    places = ["--trainer.num_nodes", nodes, "--trainer.devices", 2 // nodes]
    run = start(*[TWO_NODES] * (nodes - 1), *arguments, "ddp", *places, *KILLED)
    output, _ = run.communicate(timeout=PATIENCE)
    ended = time.time()
    assert run.returncode != 0
    assert ended - (tmp_path / "killed").stat().st_mtime < 60
    assert re.search(r"firefly-fit: error: another process of this run ended .*resume with --ckpt_path last", output)
    assert "Traceback" not in output
    assert not left_over(run.pid)
