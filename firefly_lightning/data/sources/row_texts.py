"""What the forms of rows have in common: proper texts, what a row says, and what is told of one that says nothing."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from firefly_lightning.prompt import Turn

SYSTEM_SEPARATOR = "\n"
"""What stands between a system text and the first question, as between an instruction and its input."""


class BadRowError(Exception):
    """Raised for a record that is no row to learn.

    Args:
        message: What is wrong and what to do, for a user who trains.
        fault: What is wrong in a word or two, for counting.
        place: Where in the row the fault is.
    """

    def __init__(self, message: str, fault: str, place: str = "") -> None:
        super().__init__(message)
        self.fault, self.place = fault, place


class Said(NamedTuple):
    """What the fields of a row say.

    Attributes:
        turns: (input, target) pairs.
        learned: Whether each target is learned; empty where all are.
        question: A last question that is not answered.
        unused: Names of the fields that hold text and are not read.
        document: Whether it is a text to learn as a whole, which is then the target of one turn without an input.
    """

    turns: tuple[Turn, ...]
    learned: tuple[bool, ...] = ()
    question: str | None = None
    unused: tuple[str, ...] = ()
    document: bool = False


def text_of(fields: Mapping[str, Any], name: str, place: str = "") -> str:
    """The text of a field.

    Raises:
        BadRowError: If there is no such field, or none that holds proper text.
    """
    if name not in fields:
        raise BadRowError(f"field {name!r} is missing; the row has {names_of(fields)}", "malformed", place)
    value = fields[name]
    if not isinstance(value, str):
        message = f"field {name!r} must be a string, this is {type(value).__name__}; mend the row or remove it"
        raise BadRowError(message, "not text", place)
    if has_half_a_pair(value):
        message = f"field {name!r} holds half a surrogate pair, which is no character; mend it"
        raise BadRowError(message, "broken characters", place)
    return value


def has_half_a_pair(text: str) -> bool:
    """Whether half a surrogate pair, which is no character, is in a text."""
    return not text.isascii() and _HALF.search(text) is not None


def names_of(fields: Mapping[str, Any]) -> str:
    """The names of a record's fields for a message, which a record of a thousand fields must not fill."""
    names = sorted(name if len(name) <= 40 else f"{name[:39]}…" for name in map(str, fields))
    return f"{names}" if len(names) <= 12 else f"{names[:12]} and {len(names) - 12} more"


def has_text(value: Any) -> bool:
    """Whether there is text in a value, at any depth; numbers, truth values and blanks are none."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(has_text, value.values()))
    return isinstance(value, list | tuple) and any(map(has_text, value))


def printable(text: str) -> str:
    """A text that can be printed and encoded: halves of surrogate pairs are written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def beside_all(kind: str) -> str:
    """The name of a kind in a report that also has the sums of ``all`` kinds: a kind of that name is told apart."""
    return f"{kind} (a kind)" if kind == "all" else kind


def document_of(text: str) -> Said:
    """What a text says that is learned as a whole.

    Raises:
        BadRowError: If there is nothing in it.
    """
    if not text.strip():
        raise BadRowError("the text is empty, so there is nothing to learn; remove the row", "empty")
    return Said((("", text),), document=True)


def after_system(system: str, said: Said) -> Said:
    """Puts a system text before the first question; an empty one is none."""
    if not system:
        return said
    if said.turns:
        (question, target), *later = said.turns
        return said._replace(turns=((system + SYSTEM_SEPARATOR + question, target), *later))
    return said if said.question is None else said._replace(question=system + SYSTEM_SEPARATOR + said.question)


_HALF = re.compile("[\ud800-\udfff]")
