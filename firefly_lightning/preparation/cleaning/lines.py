"""The line that is written for a row."""

import json
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from firefly_lightning.data.sources.row_texts import printable
from firefly_lightning.errors import FireflyError, some


def line_of(row: dict[str, Any], where: str) -> bytes | None:
    """The line to write for a row; None where half a surrogate pair is in the row, be it in the name of a field.

    Raises:
        FireflyError: If a value of a table or a dataset has no place in a line of JSON.
    """
    try:
        return _ENCODER.encode(row).encode() + b"\n"
    except TypeError as error:
        names = [printable(name) for name, value in row.items() if not _fits(value)]
        message = f"{where}: the field {some(names)} holds {error}, which a line of JSON cannot; leave the column out"
        raise FireflyError(message) from error
    except UnicodeEncodeError:
        return None


def _plain(value: Any) -> str:
    """A time or an exact number of a table, as a text."""
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise TypeError(type(value).__name__)


def _fits(value: Any) -> bool:
    try:
        json.dumps(value, default=_plain)
    except TypeError:
        return False
    return True


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=_plain)
