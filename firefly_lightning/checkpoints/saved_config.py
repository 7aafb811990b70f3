"""The configuration that a checkpoint was saved with, and how the configuration of a run that resumes it differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from firefly_lightning.checkpoints.layout import CONFIGURATION_KEY, TRAINER_FILE
from firefly_lightning.checkpoints.torch_file import load_file

_OF_THE_START = ("ckpt_path", "config")
"""Settings that say how a run was started, not what it does."""

_FOLLOWS = "data.init_args.prompt"
"""A setting that is the checkpoint's where a run leaves it out."""


def read_configuration(checkpoint: Path) -> str | None:
    """The configuration of the run that saved a checkpoint; None where another program saved it.

    Raises:
        FireflyError: If the checkpoint is damaged.
    """
    file = checkpoint / TRAINER_FILE if checkpoint.is_dir() else checkpoint
    configuration: str | None = load_file(file, "cpu").get(CONFIGURATION_KEY)
    return configuration


def differences(saved: str | None, now: str) -> str:
    """A table of the settings that differ between two YAML configurations; empty where none differs.

    Args:
        saved: Configuration that a checkpoint was saved with; where None, the table is empty.
        now: Configuration of the run that resumes it.
    """
    if saved is None:
        return ""
    before, after = (dict(_leaves(yaml.safe_load(text))) for text in (saved, now))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    names = [name for name in names if name.split(".")[0] not in _OF_THE_START]
    if after.get(_FOLLOWS, "") is None:
        names = [name for name in names if not name.startswith(_FOLLOWS)]
    rows = [
        ("setting", "checkpoint", "this run"),
        *((name, _shown(before, name), _shown(after, name)) for name in names),
    ]
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["Resumed with other settings, which hold from here on:", *(f"  {line}" for line in lines)])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration by its dotted name; a list is one setting."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(settings: dict[str, Any], name: str) -> str:
    text = str(settings[name]) if name in settings else "-"
    return text if len(text) <= 40 else text[:39] + "…"
