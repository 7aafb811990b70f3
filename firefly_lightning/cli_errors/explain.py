"""Says in one line what jsonargparse means.

Its messages about nested classes are long: they list every union that was tried and the given value.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from firefly_lightning.cli_errors.nearest import alike_names, nearest

_UNKNOWN = re.compile(
    r"[Oo]ption '([^']+)' is not accepted|accept option '([^']+)'|unrecognized arguments: (?:-+)([^\s=]+)"
)
_STRAY = re.compile(r"unrecognized arguments: ([^-\s]\S*)")
_CLASS = re.compile(r"given class_path '([^']+)'|Namespace\(class_path='([^']+)'")
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
_CONFIG = re.compile(r'Parser key "config": (.*)', re.DOTALL)
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (\S+)|(?:expects a function or a callable class: )?"
    r"(No module named '[\w.]+'|module '[\w.]+' has no attribute '(\w+)')"
)
_NO_KEYS = re.compile(r"Not a valid subclass of \w+|Unable to load config '([^']*)'")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")

PACKAGES = {"CometLogger": "comet_ml", "MLFlowLogger": "mlflow", "NeptuneLogger": "neptune", "WandbLogger": "wandb"}
"""Classes whose keys are known only where a package is installed, and its name."""

MEANT = {"model": "model.path", "data": "data.train_files", "trainer": "trainer.max_steps"}
"""The key that is likely meant where a text stands for a whole part of a configuration, or an example of one."""

LISTED = 20
"""How many known keys a message lists at most where none is like the one that was typed."""


def explain(message: str, known: set[str]) -> str:
    """Says in one line what an error message of jsonargparse means.

    Args:
        message: The message of the parser.
        known: Keys of the parser itself; the keys of a class that the message names are looked up in the class.
    """
    if config := _CONFIG.match(message):
        return _of_config(config[1])
    path = ".".join(dict.fromkeys(_KEY.findall(message)))
    classes = [one or other for one, other in _CLASS.findall(message)]
    if stray := _STRAY.search(message):
        hint = (
            f"did you mean --config {stray[1]}?" if stray[1].endswith((".yaml", ".yml", ".json")) else "flags have --"
        )
        return f"{stray[1]}: belongs to no flag; {hint}"
    if unknown := _UNKNOWN.search(message):
        name = next(group for group in unknown.groups() if group)
        return _no_key(path, name, classes[-1], known) if classes else _suggest("", name, known)
    if unknown := _UNKNOWN_ITEM.search(message):
        return _suggest(f"{path}.", unknown[2], set(get_type_hints(locate(unknown[1]))))
    if missing := _MISSING_ITEM.search(message):
        return f"{path}.{missing[1]} is required in every item that is no plain string"
    if classes and (required := _REQUIRED.search(message)):
        return f"{path}.{required[1]} is required; set it in the configuration or as a flag"
    if not path:
        return _line(message)
    return _of_value(path, message)


def known_keys(parser: ArgumentParser) -> set[str]:
    """Keys of a parser and of its subcommands, and those of the classes that it makes by default."""
    keys: set[str] = set()
    for action in parser._actions:
        keys.add(action.dest)
        default = action.default.as_dict() if isinstance(action.default, Namespace) else action.default
        if isinstance(default, dict) and isinstance(path := default.get("class_path"), str):
            keys |= {f"{action.dest}.{name}" for name in _init_parameters(path)}
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                keys |= known_keys(subparser)
    return keys


def _of_config(message: str) -> str:
    """What is wrong with a value of ``--config``."""
    if missing := re.search(r"does not exist: '([^']+)'", message):
        return f"--config {missing[1]}: no such file; check the path"
    if folder := re.search(r"not a file: '([^']+)'", message):
        return f"--config {folder[1]}: is a folder; name a file in it"
    return f"--config: {_line(message)}"


def _of_value(path: str, message: str) -> str:
    """What is wrong with the value of a key."""
    expected = _EXPECTED.findall(message)
    given = next((value for _, value in expected if value), None) or next(iter(_GIVEN.findall(message)), "")
    if _NO_KEYS.search(message):
        return f"{path}: {given or _NO_KEYS.search(message)[1]} is no part of a configuration; {_meant(path)}"  # type: ignore[index]
    if absent := _NO_CLASS.search(message):
        return _no_class(path, absent, given, message)
    lines = [line.strip(" -") for line in message.splitlines()]
    if reasons := [line for line in lines if line and not _FRAME.match(line)]:
        return ": ".join(filter(None, [path, given, "; ".join(reasons)]))
    types = [_type_name(name) for name, _ in expected]
    return f"{path}: {given} is not {' or '.join(dict.fromkeys(name for name in types if name != 'NoneType'))}"


def _no_class(path: str, absent: re.Match[str], given: str, message: str) -> str:
    """Says that no class or function is called so, and which one is likely meant."""
    if (module := re.match(r"No module named '(\w+)", absent[2] or "")) and Path(f"{module[1]}.py").is_file():
        return f"{path}: {absent[2]}; it is in this folder: put PYTHONPATH=. before the command"
    name = absent[1] or absent[3]
    if name is None:
        return f"{path}: {absent[2]}; {_meant(path)}"
    module = re.match(r"module '([\w.]+)'", absent[2] or "")
    there = dir(sys.modules.get(module[1])) if module else _classes(message)
    near = alike_names(name, sorted(set(there)))
    hint = f"did you mean {' or '.join(near)}?" if near else _meant(path)
    return f"{path}: no class is called {name}; {hint}" if absent[1] else f"{path}: {absent[2]}; {hint}"


def _meant(path: str) -> str:
    return f"write keys, such as {MEANT[path]}" if path in MEANT else "name a class or function that can be imported"


def _classes(message: str) -> Iterator[str]:
    """Names of the classes that the innermost key of a message accepts, as far as they have been imported."""
    subtypes = _SUBTYPES.findall(message)
    for name in re.findall(r"[\w.]+", subtypes[-1]) if subtypes else ():
        base = getattr(sys.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2], None)
        pending = [base] if isinstance(base, type) else []
        while pending:
            kind = pending.pop()
            yield kind.__name__
            pending += kind.__subclasses__()


def _no_key(path: str, name: str, kind: str, known: set[str]) -> str:
    """Says that a class has no such argument, and which key is likely meant: one of the class, or of another part."""
    package = PACKAGES.get(kind.rpartition(".")[2])
    if package and find_spec(package) is None:
        return f"{path}: {kind.rpartition('.')[2]} needs {package}, which is not installed; run pip install {package}"
    own = _init_parameters(kind)
    if name in own:  # of a base, which the class gives it a value of its own
        return f"{path}.{name}: {kind.rpartition('.')[2]} has no such key; leave it out"
    if not nearest(name, own) and (elsewhere := [key for key in nearest(name, known) if key.endswith(f".{name}")]):
        return f"{path}.{name}: no such key; did you mean {' or '.join(elsewhere)}?"
    return _suggest(f"{path}.", name, own)


def _suggest(prefix: str, name: str, known: set[str]) -> str:
    near = [f"{prefix}{key}" for key in nearest(name, known)]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(known) <= LISTED:
        hint = f"there are {', '.join(sorted(known))}"
    else:
        hint = "--help lists all"
    return f"{prefix}{name}: no such key; {hint}"


def _init_parameters(class_path: str) -> set[str]:
    """Arguments of a class, those that it passes on to its bases included."""
    parameters: set[str] = set()
    found: Any = locate(class_path)
    for base in inspect.getmro(found) if isinstance(found, type) else ():
        if base is not object and "__init__" in vars(base):
            parameters |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return parameters - {"self", "args", "kwargs"}


def _type_name(name: str) -> str:
    name = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", name)
    name = re.sub(r"<class '(?:.*\.)?([^'.]+)'>", r"\1", name)
    return {"Sequence": "a list, such as [a, b]", "Iterable": "a list"}.get(name, name)


def _line(text: str) -> str:
    return " ".join(text.split())
