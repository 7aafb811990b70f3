"""firefly: the commands around training, each a plain function whose signature and docstring are its flags and help."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jsonargparse import CLI

from firefly_lightning.chat.command import chat
from firefly_lightning.cli_errors import OneLineErrors
from firefly_lightning.errors import one_line_errors
from firefly_lightning.export import export
from firefly_lightning.interrupts import ends_on_signals, leave_to_system
from firefly_lightning.planning.command import plan
from firefly_lightning.preparation.build import build
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.stats import stats
from firefly_lightning.pruning.command import prune

COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune,
    "build": build,
    "clean": clean,
    "stats": stats,
    "plan": plan,
    "export": export,
    "chat": chat,
}

LISTS = (
    "--corpus", "--source", "--rename", "--constant", "--only", "--files", "--val_files", "--configs", "--strategies",
    "--devices", "--micro_batch_sizes", "--memory",
)  # fmt: skip
"""Flags that take several values, as in ``--corpus a.txt b.txt``."""

SWITCHES = ("--measure", "--web", "--link")
"""Flags that may stand alone."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``firefly``."""
    with ends_on_signals("firefly"), one_line_errors("firefly"):
        arguments = list(gather_lists(join_configs(sys.argv[1:] if args is None else args)))
        CLI(components=dict[str, Any](COMMANDS), args=arguments, as_positional=False, parser_class=OneLineErrors)


def command() -> None:
    """The program ``firefly``: a process that does nothing else."""
    main()
    leave_to_system()


def join_configs(args: Sequence[str]) -> list[str]:
    """Makes one list of every ``--config`` of ``firefly plan``, which jsonargparse would read as its own arguments."""
    if args[:1] != ["plan"]:
        return list(args)
    files, others, taking = list[str](), list[str](), False
    for arg in args:
        flag, _, value = arg.partition("=")
        if flag in ("--config", "--configs"):
            taking = not value
            files += [value] if value else []
        elif taking and not arg.startswith("--"):
            files.append(arg)
        else:
            taking = False
            others.append(arg)
    return [*others, "--configs", *files] if files else others


def gather_lists(args: Sequence[str]) -> Iterator[str]:
    """Joins ``--corpus a b`` into the one value ``["a", "b"]`` that jsonargparse reads; gives switches a value."""
    values: list[str] | None = None
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if values is not None and not arg.startswith("--"):
            values.append(arg)
            continue
        if values is not None:
            yield json.dumps(values)
        values = [] if arg in LISTS else None
        yield arg
        if arg in SWITCHES and following.startswith("--"):
            yield "true"
    if values is not None:
        yield json.dumps(values)
