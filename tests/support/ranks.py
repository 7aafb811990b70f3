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
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

# Imported for those that follow: every rank is forked from a process that has it already.
from firefly_lightning import cli
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
    """The life of a rank: its own environment, what it prints in files, the exit code of its last command.

    The tests' own modules, and those in its folder, can be named on the command line. Commands are lean unless they are
    asked to be whole.
    """
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(ROOT)]
    rank = next((environment[name] for name in ("RANK", "SLURM_PROCID") if name in environment), 0)
    rank_zero_only.rank = int(rank)  # Lightning asks when it is imported
    for number, path in ((1, output), (2, errors)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    gc.freeze()  # what was forked with it is never garbage: to look through it takes longer than some steps
    for name, *args in commands:
        (script,) = entry_points(group="console_scripts", name=name.removeprefix("-"))
        args = args if whole else bare(args)
        sys.argv = [str(BIN / name), *args]  # Lightning starts other ranks with it
        print("$", name, *args, flush=True)
        if whole:
            script.load()()
        elif name.startswith("-"):
            with contextlib.suppress(SystemExit), lean(args):
                script.load()()
        else:  # the configuration is checked again and again; what is wrong in these would fail later
            with lean(args), mock.patch.object(LightningArgumentParser, "validate"):
                script.load()()
        gc.collect()


def bare(args: Sequence[str]) -> Sequence[str]:
    """Without sample answers, which take longer than the steps between them; who wants them names their prompts."""
    trains = args and args[0] == "fit" and "--samples.prompts" not in args
    return [*args, "--samples.prompts", "[]"] if trains else args


@contextlib.contextmanager
def lean(args: Sequence[str]) -> Iterator[None]:
    """Without what takes longer than the training of a tiny model: figures, what the device can do at most, and parsers
    of others or made anew."""
    own = {args[0]: SUBCOMMANDS[args[0]]}
    with (
        mock.patch.object(throughput, "measure_peak", return_value=1e11),
        mock.patch.multiple(report, draw_losses=mock.DEFAULT, draw_kinds=mock.DEFAULT),
        mock.patch.object(cli.FireflyCLI, "subcommands", return_value=own),
        mock.patch.object(cli.FireflyCLI, "_setup_parser_kwargs", return_value=({}, {})),  # texts of others
        mock.patch.object(cli.FireflyCLI, "_prepare_subcommand_parser", _parser_of),
    ):
        yield


SUBCOMMANDS = cli.FireflyCLI.subcommands()

_prepare = cli.FireflyCLI._prepare_subcommand_parser
_parsers: dict[str, tuple[LightningArgumentParser, list[str]]] = {}


def _parser_of(self: cli.FireflyCLI, trainer_class: type, name: str, **kwargs: Any) -> LightningArgumentParser:
    """The parser of a subcommand, which depends on nothing else; made once in a process."""
    if name not in _parsers:
        _parsers[name] = _prepare(self, trainer_class, name, **kwargs), self._subcommand_method_arguments[name]
    parser, self._subcommand_method_arguments[name] = _parsers[name]
    return parser
