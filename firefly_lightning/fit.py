"""The program ``firefly-fit``: it prints its help at once, and starts the CLI, which takes seconds, for all else."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from firefly_lightning import __version__
from firefly_lightning.errors import FireflyError, one_line_errors
from firefly_lightning.interrupts import ends_on_signals, leave_to_system

COMMANDS = {
    "fit": "trains, and validates on the way",
    "validate": "loss, perplexity and accuracy of the validation rows, over all and by kind",
    "test": "the same of the test rows, answers them, and scores the answers by what fits their kind",
    "predict": "answers every row, into predictions.jsonl",
}

CLASSES = {
    "model": ("module", "FireflyModule"),
    "data": ("data.datamodule", "FireflyDataModule"),
    "checkpoint": ("callbacks.checkpoints", "LastCheckpoint"),
    "best_checkpoint": ("callbacks.checkpoints", "BestCheckpoint"),
    "throughput": ("callbacks.throughput", "Throughput"),
    "samples": ("callbacks.sample_answers", "Samples"),
}
"""For the first part of a key, the module and the class whose constructor's arguments are the last parts."""


class Key(NamedTuple):
    """A flag of ``firefly-fit`` and key of its YAML files.

    Attributes:
        name: The key as it is typed, such as ``data.batch_size``.
        type: The type as the constructor annotates it.
        default: The default as the constructor writes it; empty where a value must be given.
        text: What the class's docstring says of the argument, on one line.
    """

    name: str
    type: str
    default: str
    text: str


def own_keys() -> Iterator[Key]:
    """All keys that are this project's, read off the source files, since importing the classes takes seconds."""
    for first, (module, name) in CLASSES.items():
        yield from _keys_of(Path(__file__).parent / f"{module.replace('.', '/')}.py", name, first)


def trainer_keys() -> Iterator[Key]:
    """The keys of Lightning's Trainer, read off its source file, with the first sentence about each."""
    found = find_spec("lightning")
    (folder, *_) = found.submodule_search_locations or [""] if found else [""]
    source = Path(folder) / "pytorch" / "trainer" / "trainer.py"
    for key in _keys_of(source, "Trainer", "trainer"):
        yield key._replace(text=re.split(r"(?<=\w\w\.)\s|(?<=[`)]\.)\s", key.text)[0])


def _keys_of(source: Path, name: str, first: str) -> Iterator[Key]:
    """The arguments of the constructor of a class, which its docstring or that of the class describes."""
    from docstring_parser import parse

    body = ast.parse(source.read_text("utf-8")).body
    (defined,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    (init,) = (node for node in defined.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    described = [one for node in (defined, init) for one in parse(ast.get_docstring(node) or "").params]
    texts = {one.arg_name: _plain(one.description or "") for one in described}
    given = init.args.args[1:]
    required = [""] * (len(given) - len(init.args.defaults))
    defaults = [*required, *(ast.unparse(one) for one in (*init.args.defaults, *init.args.kw_defaults) if one)]
    for argument, default in zip([*given, *init.args.kwonlyargs], defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        yield Key(f"{first}.{argument.arg}", kind, default, texts.get(argument.arg, ""))


def _plain(text: str) -> str:
    """A docstring's text on one line, without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")


def overview(command: str | None = None) -> str:
    """What ``firefly-fit --help`` prints, or the help of one of its commands, which has Lightning's keys too."""
    chosen = command or "{" + ",".join(COMMANDS) + "}"
    lines = [f"usage: firefly-fit {chosen} --config FILE [--config FILE …] [--KEY VALUE …]", ""]
    lines += ["Trains a Bloom on instruction rows and evaluates it, from YAML files and flags; later ones win.", ""]
    lines += [f"  {name:10}{text}" for name, text in COMMANDS.items() if command in (None, name)]
    lines += ["", "Keys of a YAML file, each a flag too (--data.batch_size 8):", ""]
    for key in own_keys():
        lines += _described(key)
    checkpoint = (
        "ckpt_path",
        "a checkpoint to resume from or to evaluate; `last` is the newest, `best` the best; in "
        "fit, `auto` is the newest whole one, and a fresh start where there is none",
    )
    if command:
        lines += [*_wrapped(*checkpoint), "", "Arguments of Lightning's Trainer:", ""]
        for key in trainer_keys():
            lines += _described(key)
    else:
        trainer = "arguments of Lightning's Trainer, such as trainer.max_steps, .devices, .strategy"
        lines += [*_wrapped("trainer.*", trainer), *_wrapped(*checkpoint)]
        lines += ["", "Arguments of the trainer:      firefly-fit fit --help"]
    lines += [
        "" if command else lines.pop(),
        f"Keys of a class, with types:   firefly-fit {command or 'fit'} --model.help, --data.help",
        f"A configuration as it is read: firefly-fit {command or 'fit'} --config FILE --print_config",
    ]
    return "\n".join(lines)


def _described(key: Key) -> list[str]:
    default = f" (default: {key.default})" if key.default not in ("", "None") else ""
    required = " (required)" if not key.default and key.name != "data.tokenizer" else ""
    return _wrapped(key.name, f"{key.text}{default}{required}")


def _wrapped(name: str, text: str) -> list[str]:
    """Lines of the terminal's width, with a name on the left and the text about it on the right."""
    from shutil import get_terminal_size
    from textwrap import wrap

    width = max(40, min(100, get_terminal_size().columns) - 32)
    first, *rest = wrap(text, width) or [""]
    lines = [f"  {name:28}  {first}"] if len(name) <= 28 else [f"  {name}", f"{'':32}{first}"]
    return [*lines, *(f"{'':32}{line}" for line in rest)]


def check_order(arguments: Sequence[str]) -> None:
    """Checks that the command stands before its flags.

    Lightning's own way is left alone, a ``--config`` before the command whose file has a part for each command.

    Raises:
        FireflyError: If flags stand before the command; the message says what to type.
    """
    before = list(takewhile(lambda argument: argument not in COMMANDS, arguments))
    flag, _, value = before[0].partition("=") if before else ("", "", "")
    if not flag.startswith("--") or flag in ("--help", "--version", "--print_config"):
        return
    if flag == "--config" and _has_parts(Path(value or (before[1:] or [""])[0])):
        return
    rest = list(arguments[len(before) :])
    typed = shlex.join(["firefly-fit", *(rest[:1] or ["fit"]), *before, *rest[1:]])
    raise FireflyError(f"{flag} belongs after the command; type: {typed}")


def _has_parts(config: Path) -> bool:
    """Whether the first level of a configuration names commands; a file that cannot be read is told of later."""
    try:
        lines = config.expanduser().read_text("utf-8", "replace").splitlines()
    except OSError:
        return True
    return any(re.match(rf"['\"]?({'|'.join(COMMANDS)})['\"]?\s*:", line) for line in lines)


def command() -> None:
    """Runs the program ``firefly-fit``, in a process that does nothing else."""
    given = sys.argv[1:]
    with ends_on_signals("firefly-fit"), one_line_errors("firefly-fit"):
        if given in ([], ["-h"], ["--help"]):
            print(overview())
        elif len(given) == 2 and given[0] in COMMANDS and given[1] in ("-h", "--help"):
            print(overview(given[0]))
        elif given == ["--version"]:
            print(f"firefly-fit {__version__}")
        else:
            check_order(given)
            from firefly_lightning.cli import main

            main()
    leave_to_system()
