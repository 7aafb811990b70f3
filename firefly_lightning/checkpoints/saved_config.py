"""The configuration that a checkpoint was saved with, and how the configuration of a run that resumes it differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from firefly_lightning.checkpoints.layout import CONFIGURATION_KEY
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import reason

_OF_THE_START = ("ckpt_path", "config")
"""Settings that say how a run was started, not what it does."""

_FOLLOWS = "data.init_args.prompt"
"""A setting that is the checkpoint's where a run leaves it out."""

_MOST_CHARACTERS, _MOST_SETTINGS = 200_000, 20_000
"""Beyond these sizes a text is no configuration of a run; reading and comparing it could take hours."""


def read_configuration(checkpoint: Path) -> Any:
    """The configuration of the run that saved a checkpoint, whatever it is; None where another program saved it.

    Raises:
        FireflyError: If the checkpoint is damaged.
    """
    return load_file(trainer_file(checkpoint), "cpu").get(CONFIGURATION_KEY)


def differences(saved: Any, now: str) -> str:
    """A table of the settings that differ between two YAML configurations; empty where none differs.

    It is only shown, so that no configuration in a checkpoint, however broken, raises an error.

    Args:
        saved: Configuration that a checkpoint was saved with; where None, the table is empty.
        now: Configuration of the run that resumes it.
    """
    if saved is None:
        return ""
    try:
        rows = _rows(_settings(saved), _settings(now))
    except Exception as error:  # of many types, by what is wrong
        why = _printable(reason(error))
        return f"What differs from the checkpoint's settings is not shown: they cannot be read ({why})"
    if not rows:
        return ""
    rows = [("setting", "checkpoint", "this run"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["Resumed with other settings, which hold from here on:", *(f"  {line}" for line in lines)])


def _rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, old and new value of every setting that differs, as they are shown."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    names = [name for name in names if name.split(".")[0] not in _OF_THE_START]
    if after.get(_FOLLOWS, "") is None:
        names = [name for name in names if not name.startswith(_FOLLOWS)]
    return [(_printable(name), _shown(before, name), _shown(after, name)) for name in names]


def _settings(text: Any) -> dict[str, Any]:
    """Every setting of a configuration by its dotted name.

    Raises:
        ValueError: If the text is no configuration, or of a size that no configuration has.
        yaml.YAMLError: If the text is not YAML, or names objects.
    """
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        raise ValueError("no text of a configuration's size")
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None or _size(node, {}) > _MOST_SETTINGS:
        raise ValueError("none, or far more settings than a configuration has")
    settings = loader.construct_document(node)
    if not isinstance(settings, dict):
        raise ValueError(f"{type(settings).__name__} in the place of settings")
    return dict(_leaves(settings))


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node has when each of its aliases is written out, as the table would write them."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MOST_SETTINGS + 1  # what a node that contains itself finds
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
    parts = node.value if isinstance(node, yaml.SequenceNode) else parts
    known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration by its dotted name; a list is one setting."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(settings: dict[str, Any], name: str) -> str:
    text = _printable(str(settings[name])) if name in settings else "-"
    return text if len(text) <= 40 else text[:39] + "…"


def _printable(text: str) -> str:
    """A text without what would move a terminal's cursor: it may come from somebody else's checkpoint."""
    return "".join(character if character.isprintable() else " " for character in text)
