"""firefly: the commands around training, each a plain function whose signature and docstring are its flags and help."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jsonargparse import CLI

from firefly_lightning.chat import chat
from firefly_lightning.data.build import build
from firefly_lightning.data.clean import clean
from firefly_lightning.data.stats import stats
from firefly_lightning.errors import one_line_errors
from firefly_lightning.export import export
from firefly_lightning.parsing import OneLineErrors
from firefly_lightning.pruning import prune

COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune,
    "build": build,
    "clean": clean,
    "stats": stats,
    "export": export,
    "chat": chat,
}

LISTS = ("--corpus", "--source", "--rename", "--constant", "--only", "--files", "--val_files")
"""Flags that take several values, as in ``--corpus a.txt b.txt``."""

SWITCHES = ("--web",)
"""Flags that stand alone; jsonargparse wants a value after them."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``firefly``."""
    with one_line_errors("firefly"):
        given = (f"{arg}=true" if arg in SWITCHES else arg for arg in (sys.argv[1:] if args is None else args))
        arguments = list(gather_lists(given))
        CLI(components=dict[str, Any](COMMANDS), args=arguments, as_positional=False, parser_class=OneLineErrors)


def gather_lists(args: Iterable[str]) -> Iterator[str]:
    """Joins ``--corpus a b`` into the one value ``["a", "b"]`` that jsonargparse reads."""
    values: list[str] | None = None
    for arg in args:
        if values is not None and not arg.startswith("--"):
            values.append(arg)
            continue
        if values is not None:
            yield json.dumps(values)
        values = [] if arg in LISTS else None
        yield arg
    if values is not None:
        yield json.dumps(values)
