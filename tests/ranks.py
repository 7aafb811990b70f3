"""One rank of several: runs the commands it is given, one after another. Started by `run_ranks`.

A command whose name begins with a dash may end with an error, as in a makefile; the next one is run all the same.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

# Imported for those that follow: every rank is forked from a process that has it already.
import firefly_lightning.cli  # noqa: F401


def run_rank(commands: Sequence[Sequence[str]], environment: dict[str, str], output: Path) -> None:
    """The life of a rank: its own environment, everything it prints in a file, the exit code of its last command."""
    os.environ.update(environment)
    rank_zero_only.rank = int(environment["RANK"])  # Lightning asks when it is imported
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    for name, *args in commands:
        (script,) = entry_points(group="console_scripts", name=name.removeprefix("-"))
        sys.argv = [name, *args]
        print("$", *sys.argv, flush=True)
        with contextlib.suppress(SystemExit if name.startswith("-") else ()):
            script.load()()
        gc.collect()
