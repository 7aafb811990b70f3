"""The program ``firefly-fit``: it prints its help at once, and starts the CLI, which takes seconds, for all else."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from firefly_lightning import __version__
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
        source = Path(__file__).parent / f"{module.replace('.', '/')}.py"
        (defined,) = (
            node
            for node in ast.parse(source.read_text("utf-8")).body
            if isinstance(node, ast.ClassDef) and node.name == name
        )
        yield from _keys_of(defined, first)


def _keys_of(defined: ast.ClassDef, first: str) -> Iterator[Key]:
    from docstring_parser import parse

    texts = {one.arg_name: _plain(one.description or "") for one in parse(ast.get_docstring(defined) or "").params}
    (init,) = (node for node in defined.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    given = init.args.args[1:]
    required = [""] * (len(given) - len(init.args.defaults))
    for argument, default in zip(given, [*required, *map(ast.unparse, init.args.defaults)], strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        yield Key(f"{first}.{argument.arg}", kind, default, texts.get(argument.arg, ""))


def _plain(text: str) -> str:
    """A docstring's text on one line, without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")


def overview() -> str:
    """What ``firefly-fit --help`` prints."""
    lines = ["usage: firefly-fit {" + ",".join(COMMANDS) + "} --config FILE [--config FILE …] [--KEY VALUE …]", ""]
    lines += ["Trains a Bloom on instruction rows and evaluates it, from YAML files and flags; later ones win.", ""]
    lines += [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    lines += ["", "Keys of a YAML file, each a flag too (--data.batch_size 8):", ""]
    for key in own_keys():
        default = f" (default: {key.default})" if key.default not in ("", "None") else ""
        required = " (required)" if not key.default and key.name != "data.tokenizer" else ""
        lines += _wrapped(key.name, f"{key.text}{default}{required}")
    lines += [
        *_wrapped("trainer.*", "arguments of Lightning's Trainer, such as trainer.max_steps, .devices, .strategy"),
        *_wrapped("ckpt_path", "a checkpoint to resume from or to evaluate; `last` is the newest, `best` the best"),
        "",
        "Arguments of the trainer:      firefly-fit fit --help",
        "Keys of a class, with types:   firefly-fit fit --model.help, --data.help",
        "A configuration as it is read: firefly-fit fit --config FILE --print_config",
    ]
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    """Lines of the terminal's width, with a name on the left and the text about it on the right."""
    from shutil import get_terminal_size
    from textwrap import wrap

    width = max(40, min(100, get_terminal_size().columns) - 32)
    first, *rest = wrap(text, width) or [""]
    lines = [f"  {name:28}  {first}"] if len(name) <= 28 else [f"  {name}", f"{'':32}{first}"]
    return [*lines, *(f"{'':32}{line}" for line in rest)]


def command() -> None:
    """Runs the program ``firefly-fit``, in a process that does nothing else."""
    with ends_on_signals("firefly-fit"):
        if sys.argv[1:] in ([], ["-h"], ["--help"]):
            print(overview())
        elif sys.argv[1:] == ["--version"]:
            print(f"firefly-fit {__version__}")
        else:
            from firefly_lightning.cli import main

            main()
    leave_to_system()
