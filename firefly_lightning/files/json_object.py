"""JSON files that hold an object: a model's configuration, an engine's settings, a report; and keys that are twice.

A key that an object of JSON or YAML has twice is a mistake: readers keep the last value, and say nothing.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from firefly_lightning.errors import FireflyError, reason, unreadable


class RepeatedKeyError(ValueError):
    """Raised for an object that has a key twice, of whose values one would be lost.

    Args:
        key: The key.
        line: The line on which it is the second time, where it is known.
    """

    def __init__(self, key: str, line: int | None = None) -> None:
        shown = key if len(key) <= 40 else f"{key[:39]}…"
        place = f", again on line {line}" if line else ""
        super().__init__(f"has the key {shown!r} twice{place}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return fields


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON; raises a :class:`RepeatedKeyError` where a key is twice in an object, else what ``json`` raises."""
_LENIENT_JSON = json.JSONDecoder()


def read_json(text: str) -> Any:
    """What ``STRICT_JSON`` reads; sooner where a text is an object with a colon for each of its keys, and no other."""
    value = _LENIENT_JSON.decode(text)
    if isinstance(value, dict) and text.count(":") == len(value):
        return value
    return STRICT_JSON.decode(text)


def check_keys(node: yaml.Node | None) -> None:
    """Checks the keys of all mappings of a YAML document.

    Args:
        node: Its root, as ``yaml.compose`` gives it.

    Raises:
        RepeatedKeyError: If a mapping has a key twice; the message names its line.
    """
    seen, pending = set(), [node]
    while pending:
        one = pending.pop()
        if not isinstance(one, yaml.CollectionNode) or id(one) in seen:
            continue
        seen.add(id(one))  # an alias is the node that it stands for
        if isinstance(one, yaml.MappingNode):
            keys = [
                (key.tag, key.value, key.start_mark.line) for key, _ in one.value if isinstance(key, yaml.ScalarNode)
            ]
            known: set[tuple[str, str]] = set()
            for tag, key, line in keys:
                if (tag, key) in known:
                    raise RepeatedKeyError(key, line + 1)
                known.add((tag, key))
            pending += [part for pair in one.value for part in pair]
        else:
            pending += one.value


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """Reads the object that a JSON file holds.

    Args:
        file: The file.
        remedy: What to do about a file that is damaged, for the message.

    Raises:
        MissingFileError: If there is no such file.
        FireflyError: If the file cannot be read, is no JSON in UTF-8, holds something else than an object, or has a key
            twice.
    """
    try:
        content = STRICT_JSON.decode(file.read_text("utf-8"))
    except OSError as error:
        raise unreadable(error, file) from error
    except RepeatedKeyError as error:
        raise FireflyError(f"{file}: {error}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise FireflyError(f"{file}: not JSON ({reason(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise FireflyError(f"{file}: must hold a JSON object, this is {type(content).__name__}; {remedy}")
    return content


def write_json(content: dict[str, Any], file: Path) -> None:
    """Writes an object into a JSON file, indented, with Chinese text as it is."""
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
