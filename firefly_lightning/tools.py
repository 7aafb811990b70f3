"""firefly: the commands around training, each a plain function whose signature and docstring are its flags and help.

A command's module imports what is heavy only when the command runs, so that its help is there at once.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

from firefly_lightning import __version__
from firefly_lightning.errors import one_line_errors
from firefly_lightning.interrupts import ends_on_signals, leave_to_system

COMMANDS = {
    "prune": "pruning.command",
    "build": "preparation.build",
    "clean": "preparation.clean",
    "stats": "preparation.stats",
    "plan": "planning.command",
    "export": "export",
    "push": "publishing.push",
    "chat": "chat.command",
}
"""For each command, the module whose function of the same name runs it."""

Function = Callable[..., None]


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command of ``firefly``.

    Args:
        args: Arguments after ``firefly`` on the command line; by default those of this process.
    """
    with ends_on_signals("firefly"), one_line_errors("firefly"):
        from jsonargparse import CLI

        from firefly_lightning.cli_errors import OneLineErrors, check_values

        given = list(sys.argv[1:] if args is None else args)
        check_values(given)
        if given == ["--version"]:
            print(f"firefly {__version__}")
            return
        # Where one command is named, the modules of the others are not needed.
        names = given[:1] if given[:1] and given[0] in COMMANDS else [*COMMANDS]
        components: dict[str, Any] = {name: command_function(name) for name in names}
        if len(names) == 1:
            given = list(gather_lists(join_configs(given), components[names[0]]))
        CLI(components=components, args=given or ["--help"], as_positional=False, parser_class=OneLineErrors)


def command() -> None:
    """Runs the program ``firefly``, in a process that does nothing else."""
    main()
    leave_to_system()


def command_function(name: str) -> Function:
    """The function that runs a command."""
    function: Function = getattr(import_module(f"firefly_lightning.{COMMANDS[name]}"), name)
    return function


def join_configs(args: Sequence[str]) -> list[str]:
    """Makes one list of all ``--config`` of ``firefly plan``, which jsonargparse would read as a flag of its own."""
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


def gather_lists(args: Sequence[str], function: Function) -> Iterator[str]:
    """Joins ``--corpus a b`` into the one value ``["a", "b"]`` that jsonargparse reads; gives switches a value.

    Args:
        args: A command and its flags.
        function: Function of the command; an argument annotated as a list takes several values, and a ``bool`` may
            stand without a value.
    """
    lists, switches = _flags(function, list), _flags(function, bool)
    values: list[str] | None = None
    args = [part for arg in args for part in (arg.split("=", 1) if arg.partition("=")[0] in lists else [arg])]
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if values is not None and not arg.startswith("--"):
            values.append(arg)
            continue
        if values is not None:
            yield json.dumps(values)
        values = [] if arg in lists else None
        yield arg
        if arg in switches and following.startswith("--"):
            yield "true"
    if values is not None:
        yield json.dumps(values)


def _flags(function: Function, kind: type) -> set[str]:
    """Flags of a command whose annotation is the given type or a union with it."""
    hints = get_type_hints(function)
    found = set()
    for name in signature(function).parameters:
        types = get_args(hints[name]) or (hints[name],)
        if kind in (get_origin(hints[name]), *types, *map(get_origin, types)):
            found.add(f"--{name}")
    return found
