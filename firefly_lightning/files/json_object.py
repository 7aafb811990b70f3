"""JSON files that hold an object: a model's configuration, an engine's settings, a report."""

import json
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError, reason, unreadable


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """Reads the object that a JSON file holds.

    Args:
        file: The file.
        remedy: What to do about a file that is damaged, for the message.

    Raises:
        MissingFileError: If there is no such file.
        FireflyError: If the file cannot be read, is no JSON in UTF-8, or holds something else than an object.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise unreadable(error, file) from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise FireflyError(f"{file}: not JSON ({reason(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise FireflyError(f"{file}: must hold a JSON object, this is {type(content).__name__}; {remedy}")
    return content


def write_json(content: dict[str, Any], file: Path) -> None:
    """Writes an object into a JSON file, indented, with Chinese text as it is."""
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
