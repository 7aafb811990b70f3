"""Runs commands one after another in one of several ranks, which `run_ranks` starts.

A command whose name begins with a dash may end with an error, as in a makefile; the next one is run all the same.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

# Imported for the ranks: each is forked from a process that has imported this module.
from firefly_lightning import cli, errors
from firefly_lightning.callbacks import run_report as report
from firefly_lightning.callbacks import throughput

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run_rank(
    commands: Sequence[Sequence[str]],
    environment: dict[str, str],
    output: Path,
    errors: Path,
    folder: Path,
    whole: bool = False,
) -> None:
    """Runs the commands of a rank in this process, which ends with the exit code of the last one.

    The command lines can name modules of the tests and of ``folder``.

    Args:
        commands: Names and arguments of the commands.
        environment: Environment variables of the rank.
        output: File for what the rank prints.
        errors: File for what the rank prints to standard error.
        folder: Working folder of the commands.
        whole: Whether to run commands as a user does, with the parts that :func:`lean` leaves out.
    """
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(ROOT)]
    rank = next((environment[name] for name in ("RANK", "SLURM_PROCID") if name in environment), 0)
    rank_zero_only.rank = int(rank)  # Lightning reads the rank when it is imported
    for number, path in ((1, output), (2, errors)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    gc.freeze()  # what was forked with it is never garbage; going through it takes longer than some steps
    for name, *args in commands:
        (script,) = entry_points(group="console_scripts", name=name.removeprefix("-"))
        args = args if whole else bare(args)
        sys.argv = [str(BIN / name), *args]  # Lightning starts other ranks with this command line
        print("$", name, *args, flush=True)
        if whole:
            script.load()()
        elif name.startswith("-"):
            with contextlib.suppress(SystemExit), lean(args):
                script.load()()
        else:  # without checking the configuration again and again; a wrong one would fail later
            with lean(args), mock.patch.object(LightningArgumentParser, "validate"):
                script.load()()
        gc.collect()


def bare(args: Sequence[str]) -> Sequence[str]:
    """Arguments of a run without sample answers, which take longer than the steps, unless they name prompts."""
    trains = args and args[0] == "fit" and "--samples.prompts" not in args
    return [*args, "--samples.prompts", "[]"] if trains else args


@contextlib.contextmanager
def lean(args: Sequence[str]) -> Iterator[None]:
    """A context in which a command leaves out what takes longer than the training of a tiny model.

    It draws no figures, does not measure the device's peak, makes only the parser of its own subcommand, once, and as a
    failing rank does not wait for a first process to report the same: ranks of tests are forked from a server.
    """
    own = {args[0]: SUBCOMMANDS[args[0]]}
    with (
        mock.patch.object(throughput, "measure_peak", return_value=1e11),
        mock.patch.object(errors, "_parent_ends", return_value=False),
        mock.patch.multiple(report, draw_losses=mock.DEFAULT, draw_kinds=mock.DEFAULT, draw_pairs=mock.DEFAULT),
        mock.patch.object(cli.FireflyCLI, "subcommands", return_value=own),
        mock.patch.object(cli.FireflyCLI, "_setup_parser_kwargs", return_value=({}, {})),  # texts of others
        mock.patch.object(cli.FireflyCLI, "_prepare_subcommand_parser", _parser_of),
    ):
        yield


SUBCOMMANDS = cli.FireflyCLI.subcommands()

_prepare = cli.FireflyCLI._prepare_subcommand_parser
_parsers: dict[str, tuple[LightningArgumentParser, list[str]]] = {}


def _parser_of(self: cli.FireflyCLI, trainer_class: type, name: str, **kwargs: Any) -> LightningArgumentParser:
    """The parser of a subcommand, made once in a process, since it depends on nothing but the subcommand."""
    if name not in _parsers:
        _parsers[name] = _prepare(self, trainer_class, name, **kwargs), self._subcommand_method_arguments[name]
    parser, self._subcommand_method_arguments[name] = _parsers[name]
    return parser
