"""One rank of several: runs the commands it is given, one after another. Started by `run_ranks`.

A command whose name begins with a dash may end with an error, as in a makefile; the next one is run all the same.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch.utilities import rank_zero_only

# Imported for those that follow: every rank is forked from a process that has it already.
from firefly_lightning import cli, report

ROOT = Path(__file__).parents[1]


def run_rank(
    commands: Sequence[Sequence[str]], environment: dict[str, str], output: Path, errors: Path, folder: Path
) -> None:
    """The life of a rank: its own environment, what it prints in files, the exit code of its last command.

    The tests' own modules, and those in its folder, can be named on the command line.
    """
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(ROOT)]
    rank_zero_only.rank = int(environment.get("RANK", 0))  # Lightning asks when it is imported
    for number, path in ((1, output), (2, errors)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    for name, *args in commands:
        (script,) = entry_points(group="console_scripts", name=name.removeprefix("-"))
        sys.argv = [name, *bare(args)]
        print("$", *sys.argv, flush=True)
        with contextlib.suppress(SystemExit if name.startswith("-") else ()), lean(args):
            script.load()()
        gc.collect()


def bare(args: Sequence[str]) -> Sequence[str]:
    """Without sample answers, which take longer than the steps between them; who wants them names their prompts."""
    trains = args and args[0] == "fit" and "--samples.prompts" not in args
    return [*args, "--samples.prompts", "[]"] if trains else args


@contextlib.contextmanager
def lean(args: Sequence[str]) -> Iterator[None]:
    """Without what takes longer than the training of a tiny model: figures, and the parsers of other subcommands."""
    known = cli.FireflyCLI.subcommands()
    own = {name: known[name] for name in known if name in (args[0], "predict")}  # the command has a text for `predict`
    with (
        mock.patch.multiple(report, draw_losses=mock.DEFAULT, draw_kinds=mock.DEFAULT),
        mock.patch.object(cli.FireflyCLI, "subcommands", staticmethod(lambda: own)),
    ):
        yield
