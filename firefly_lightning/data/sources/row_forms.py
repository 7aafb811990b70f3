"""Instruction rows of files and Hugging Face datasets: one table of the forms that rows are in, and two readers.

:func:`read_rows` is strict: it gives rows that can be learned, and refuses all others. :func:`read_leniently` says of
any record what it holds and what is wrong with it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from firefly_lightning.data.sources.records import read_records
from firefly_lightning.errors import FireflyError
from firefly_lightning.prompt import Turn

TURN_SEPARATOR = "</s>"
"""Text that separates the later turns inside the ``target`` of a published Firefly row."""


RowFormat = Callable[[Mapping[str, Any]], tuple[str, Sequence[Turn]] | None]
"""A user's reader of rows: gives kind and turns from a row's fields, or None where the row is in another form."""


class Row(NamedTuple):
    """One instruction row.

    Attributes:
        kind: The task, as in the published data; ``Belle`` or ``Conversation`` where the source names none.
        turns: (input, target) pairs, at least one, no target empty.
        number: The row's line in a ``.jsonl`` file, else its position in the source; from 1.
        unanswered: Whether a last turn without an answer was left out.
    """

    kind: str
    turns: tuple[Turn, ...]
    number: int
    unanswered: bool = False

    @property
    def identity(self) -> int:
        """A hash of the row's text; neither the form that the row was in nor blanks make a difference."""
        text = "\0".join("".join(part.split()) for turn in self.turns for part in turn)
        return xxhash.xxh3_64_intdigest(text.encode())


class Reading(NamedTuple):
    """What a record says, whatever is wrong with it.

    Attributes:
        kind: The kind that the record names, else the name of its form; None where neither is known.
        turns: (input, target) pairs; empty for a raw row, and for a row that has a fault.
        others: Values of the fields that are neither a part of the turns nor the kind.
        fault: Why no turns can be read though the row is in a known form, in a word or two; None where they can.
    """

    kind: str | None
    turns: tuple[Turn, ...]
    others: list[Any]
    fault: str | None = None


def read_rows(source: str, row_format: RowFormat | None = None) -> Iterator[Row]:
    """Streams the rows of one file (``.jsonl``, ``.json``, ``.parquet``) or dataset.

    The form of each row is recognised from its fields: Firefly ``{"kind","input","target"}``, Belle
    ``{"instruction","input","output"}``, also without ``input``, or ``{"conversation":[{"human","assistant"},…]}``.

    Args:
        source: A source, as :func:`firefly_lightning.data.sources.records.find_sources` gives it.
        row_format: Function for rows in a form of the user's own, which is asked first for every row.

    Raises:
        FireflyError: If the source is empty, or a row is in none of the forms or malformed; the message names file and
            line.
    """
    number = 0
    for number, fields in read_records(source):
        try:
            row = (row_format and _read_own(row_format, fields, number)) or _read_known(fields, number)
        except _BadRowError as error:
            raise FireflyError(f"{source}:{number}{error.place}: {error}") from error
        yield row
    if not number:
        raise FireflyError(f"{source}: has no rows; remove it from the list or fill it")


def read_leniently(fields: Mapping[str, Any]) -> Reading:
    """What a record says: its turns where it is a row in a known form, the values of its fields where not (a raw row).

    A Firefly row needs no kind here, since the templates that build rows are given the kind apart.
    """
    form = _form_of(fields)
    if form is None and {*fields, "kind"} >= _FIREFLY.required:
        form, fields = _FIREFLY, {**fields, "kind": ""}
    if form is None:
        return Reading(_named_kind(fields), (), _values(fields, {"kind"}))
    try:
        kind, (turns, _) = form.kind(fields), form.turns(fields)
    except _BadRowError as error:
        return Reading(_named_kind(fields) or form.name, (), _values(fields, {"kind"}), error.fault)
    return Reading(kind, turns, _values(fields, {"kind", *form.required, *form.optional}))


class _BadRowError(Exception):
    """Raised for a record that is no row to learn.

    Args:
        message: What is wrong and what to do, for a user who trains.
        fault: What is wrong in a word or two, for counting.
        place: Where in the row the fault is.
    """

    def __init__(self, message: str, fault: str, place: str = "") -> None:
        super().__init__(message)
        self.fault, self.place = fault, place


class _Form(NamedTuple):
    """One form that rows are in.

    Attributes:
        shown: How messages show the form.
        required: Fields by which the form is recognised.
        turns: Function that reads a row's turns, and whether a last turn without an answer was left out.
        name: Kind of a row that names none; None where every row must name its kind.
        optional: Fields of the turns that may be missing or null.
    """

    shown: str
    required: frozenset[str]
    turns: Callable[[Mapping[str, Any]], tuple[tuple[Turn, ...], bool]]
    name: str | None = None
    optional: frozenset[str] = frozenset()

    def kind(self, fields: Mapping[str, Any]) -> str:
        """The kind of a row in this form."""
        if self.name is None:
            return _text(fields, "kind")
        return _text(fields, "kind") if isinstance(fields.get("kind"), str) and fields["kind"] else self.name


def _firefly_turns(fields: Mapping[str, Any]) -> tuple[tuple[Turn, ...], bool]:
    pieces = [_text(fields, "input"), *_text(fields, "target").split(TURN_SEPARATOR)]
    while len(pieces) > 2 and not pieces[-1].strip():
        pieces.pop()  # a closing </s> written out, or nothing after it
    return tuple(zip(pieces[0::2], pieces[1::2], strict=False)), len(pieces) % 2 == 1


def _belle_turns(fields: Mapping[str, Any]) -> tuple[tuple[Turn, ...], bool]:
    parts = [_text(fields, "instruction"), "" if fields.get("input") is None else _text(fields, "input")]
    return (("\n".join(filter(None, parts)), _text(fields, "output")),), False


def _conversation_turns(fields: Mapping[str, Any]) -> tuple[tuple[Turn, ...], bool]:
    conversation = fields["conversation"]
    if not isinstance(conversation, list) or not conversation:
        message = "'conversation' must be a list of at least one {human, assistant}"
        raise _BadRowError(message, "malformed" if conversation else "empty")
    turns = []
    for index, turn in enumerate(conversation, 1):
        if not isinstance(turn, dict):
            message = f"turn {index} of 'conversation' must be an object with human and assistant"
            raise _BadRowError(message, "malformed")
        place = f", turn {index}"
        turns.append((_text(turn, "human", place), _text(turn, "assistant", place)))
    return tuple(turns), False


_FIREFLY = _Form("{kind, input, target}", frozenset({"kind", "input", "target"}), _firefly_turns)
_FORMS = (
    _FIREFLY,
    _Form(
        "{instruction, output} with or without input",
        frozenset({"instruction", "output"}),
        _belle_turns,
        "Belle",
        frozenset({"input"}),
    ),
    _Form("{conversation: [{human, assistant}, …]}", frozenset({"conversation"}), _conversation_turns, "Conversation"),
)


def _form_of(fields: Mapping[str, Any]) -> _Form | None:
    """The first form whose fields a record has, preferably none of them null: a table has every column in every row."""
    with_nulls = None
    for form in _FORMS:
        if form.required <= fields.keys():
            if None not in fields.values() or None not in map(fields.get, form.required):
                return form
            with_nulls = with_nulls or form
    return with_nulls


def _read_known(fields: Mapping[str, Any], number: int) -> Row:
    form = _form_of(fields)
    if form is None:
        raise _BadRowError(_no_form(fields), "no form")
    kind, (turns, unanswered) = form.kind(fields), form.turns(fields)
    return _row(kind, turns, number, unanswered)


def _read_own(row_format: RowFormat, fields: Mapping[str, Any], number: int) -> Row | None:
    try:
        found = row_format(fields)
        if found is None:
            return None
        kind, turns = found[0], [{"input": question, "target": answer} for question, answer in found[1]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message = f"the function of data.row_format failed, {type(error).__name__}: {error}; mend it or the row"
        raise _BadRowError(message, "malformed") from error
    if not turns:
        raise _BadRowError("the function of data.row_format gave no turn; remove the row", "empty")
    texts = tuple((_text(turn, "input"), _text(turn, "target")) for turn in turns)
    return _row(_text({"kind": kind}, "kind"), texts, number)


def _row(kind: str, turns: tuple[Turn, ...], number: int, unanswered: bool = False) -> Row:
    for index, (_, target) in enumerate(turns, 1):
        if not target.strip():
            turn = f" of turn {index}" if len(turns) > 1 else ""
            message = f"the target{turn} is empty, so there is nothing to learn; remove the row"
            raise _BadRowError(message, "empty")
    return Row(kind, turns, number, unanswered)


def _no_form(fields: Mapping[str, Any]) -> str:
    *others, last = (form.shown for form in _FORMS)
    forms = f"{', '.join(others)} or {last}"
    for form in _FORMS:  # what lacks one field only was meant to be in this form
        missing = form.required - fields.keys()
        if len(missing) == 1 < len(form.required):
            return f"field {next(iter(missing))!r} is missing; the row has {sorted(fields)}; use {forms}"
    return f"fields {sorted(fields)} are none of the accepted forms; use {forms}"


def _text(fields: Mapping[str, Any], name: str, place: str = "") -> str:
    if name not in fields:
        raise _BadRowError(f"field {name!r} is missing; the row has {sorted(fields)}", "malformed", place)
    value = fields[name]
    if not isinstance(value, str):
        message = f"field {name!r} must be a string, this is {type(value).__name__}; mend the row or remove it"
        raise _BadRowError(message, "not text", place)
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        message = f"field {name!r} holds half a surrogate pair, which is no character; mend it"
        raise _BadRowError(message, "broken characters", place)
    return value


def _named_kind(fields: Mapping[str, Any]) -> str | None:
    """The kind that a record names; None where it names none, or none that is proper text."""
    try:
        return _text(fields, "kind") or None
    except _BadRowError:
        return None


def _values(fields: Mapping[str, Any], known: set[str]) -> list[Any]:
    return [value for name, value in fields.items() if name not in known]
