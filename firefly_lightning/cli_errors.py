"""Command-line errors in one line that names the key, and the nearest known key.

The messages of jsonargparse about nested classes are long: they list every union that was tried and the given value.
"""

import argparse
import difflib
import inspect
import re
from pydoc import locate
from typing import NoReturn, get_type_hints

from jsonargparse import ArgumentParser

from firefly_lightning.errors import FireflyError

_UNKNOWN = re.compile(
    r"[Oo]ption '([^']+)' is not accepted|accept option '([^']+)'|unrecognized arguments: -*([^\s=]+)"
)
_CLASS = re.compile(r"given class_path '([^']+)'")
_KEY = re.compile(r'Parser key "([^"]+)"')
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$", re.MULTILINE)
_REQUIRED = re.compile(r"arguments are required: ([\w., -]+)")
_GIVEN = re.compile(r"Given value: (.*)")
_UNKNOWN_ITEM = re.compile(
    r"(?:<class '|dict\[str, )([\w.]+)(?:'>|\])(?:, <class 'NoneType'>)?\]\n"
    r"(?:(?!Subtypes:).|\n)*?Unexpected keys: \{'([^']+)'"
)
_FRAME = re.compile(r"Parser key |Expected an? |Does not validate|Subtypes:|Errors:|Problem with|Given value")
_MISSING_ITEM = re.compile(r"Missing required keys: \{'([^']+)'")


class OneLineErrors(ArgumentParser):  # type: ignore[misc]
    """A parser that raises a one-line :class:`FireflyError` where it would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the error; a parser inside a type reports to the parser around it, as in jsonargparse."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise FireflyError(explain(message, known_keys(self))) from ex


def explain(message: str, known: set[str]) -> str:
    """Says in one line what an error message of jsonargparse means.

    Args:
        message: The message of the parser.
        known: Keys of the parser itself; the keys of a class that the message names are looked up in the class.
    """
    path = ".".join(_KEY.findall(message))
    classes = _CLASS.findall(message)
    if unknown := _UNKNOWN.search(message):
        name = next(group for group in unknown.groups() if group)
        prefix = f"{path}." if classes else ""
        return _suggest(prefix, name, _init_parameters(classes[-1]) if classes else known)
    if unknown := _UNKNOWN_ITEM.search(message):
        return _suggest(f"{path}.", unknown[2], set(get_type_hints(locate(unknown[1]))))
    if missing := _MISSING_ITEM.search(message):
        return f"{path}.{missing[1]} is required in every item that is no plain string"
    if classes and (required := _REQUIRED.search(message)):
        return f"{path}.{required[1]} is required; set it in the configuration or as a flag"
    if not path:
        return " ".join(message.split())
    expected = _EXPECTED.findall(message)
    given = next((value for _, value in expected if value), None) or next(iter(_GIVEN.findall(message)), "")
    lines = [line.strip(" -") for line in message.splitlines()]
    if reasons := [line for line in lines if line and not _FRAME.match(line)]:
        return ": ".join(filter(None, [path, given, "; ".join(reasons)]))
    types = [_type_name(name) for name, _ in expected]
    return f"{path}: {given} is not {' or '.join(dict.fromkeys(name for name in types if name != 'NoneType'))}"


def known_keys(parser: ArgumentParser) -> set[str]:
    """Keys of a parser and of its subcommands."""
    keys: set[str] = set()
    for action in parser._actions:
        keys.add(action.dest)
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                keys |= known_keys(subparser)
    return keys


def _suggest(prefix: str, name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{prefix}{name}: no such key; {hint}"


def _init_parameters(class_path: str) -> set[str]:
    """Arguments of a class, those that it passes on to its bases included."""
    parameters: set[str] = set()
    found = locate(class_path)
    for base in inspect.getmro(found) if isinstance(found, type) else ():
        if base is not object and "__init__" in vars(base):
            parameters |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return parameters - {"self", "args", "kwargs"}


def _type_name(name: str) -> str:
    name = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", name)
    return re.sub(r"<class '(?:.*\.)?([^'.]+)'>", r"\1", name)
