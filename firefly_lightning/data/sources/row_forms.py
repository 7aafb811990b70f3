"""Instruction rows from files and Hugging Face datasets, whatever of three forms they are in."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from firefly_lightning.data.sources.records import read_records
from firefly_lightning.errors import FireflyError
from firefly_lightning.prompt import Turn

TURN_SEPARATOR = "</s>"
"""What parts the later turns inside the ``target`` of a published Firefly row."""


RowFormat = Callable[[Mapping[str, Any]], tuple[str, Sequence[Turn]] | None]
"""A form of one's own: gives the kind and the turns of a row's fields, or None where the row is in another form."""


class Row(NamedTuple):
    """One instruction row.

    Attributes:
        kind: The task, as in the published data; ``Belle`` or ``Conversation`` where the source names none.
        turns: (input, target) pairs, at least one, no target empty.
        number: Line in a ``.jsonl`` file, else position in the source; from 1.
        unanswered: Whether a last turn without an answer was left out.
    """

    kind: str
    turns: tuple[Turn, ...]
    number: int
    unanswered: bool = False

    @property
    def identity(self) -> int:
        """A hash of the row's text; the form it was in and its blanks make no difference."""
        text = "\0".join("".join(part.split()) for turn in self.turns for part in turn)
        return xxhash.xxh3_64_intdigest(text.encode())


def read_rows(source: str, row_format: RowFormat | None = None) -> Iterator[Row]:
    """Streams the rows of one file (``.jsonl``, ``.json``, ``.parquet``) or dataset.

    The form is recognised from the fields of the first row: Firefly ``{"kind","input","target"}``, Belle
    ``{"instruction","input","output"}``, or ``{"conversation":[{"human","assistant"},…]}``.

    Args:
        source: As :func:`firefly_lightning.data.sources.records.find_sources` gives it.
        row_format: Is asked first, for every row.

    Raises:
        FireflyError: If the source is empty, is in none of the forms, or a row is malformed; with file and line.
    """
    parse: Callable[[Mapping[str, Any], str, int], Row] | None = None
    number = 0
    for number, fields in read_records(source):
        where = f"{source}:{number}"
        row = row_format and _parse_own(row_format, fields, where, number)
        if not row:
            parse = parse or _recognise(fields, where)
            row = parse(fields, where, number)
        yield row
    if not number:
        raise FireflyError(f"{source}: has no rows; remove it from the list or fill it")


def _parse_own(row_format: RowFormat, fields: Mapping[str, Any], where: str, number: int) -> Row | None:
    try:
        found = row_format(fields)
        if found is None:
            return None
        kind, turns = found[0], [{"input": question, "target": answer} for question, answer in found[1]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FireflyError(
            f"{where}: the function of data.row_format failed, {type(error).__name__}: {error}; mend it or the row"
        ) from error
    if not turns:
        raise FireflyError(f"{where}: the function of data.row_format gave no turn; remove the row")
    texts = tuple((_text(turn, "input", where), _text(turn, "target", where)) for turn in turns)
    return _row(_text({"kind": kind}, "kind", where), texts, where, number)


def _recognise(fields: Mapping[str, Any], where: str) -> Callable[[Mapping[str, Any], str, int], Row]:
    for required, parse in _FORMS:
        if required <= fields.keys():
            return parse
    raise FireflyError(
        f"{where}: fields {sorted(fields)} are none of the accepted forms; use {{kind, input, target}}, "
        "{instruction, input, output} or {conversation: [{human, assistant}, …]}"
    )


def _parse_firefly(fields: Mapping[str, Any], where: str, number: int) -> Row:
    kind = _text(fields, "kind", where)
    pieces = [_text(fields, "input", where), *_text(fields, "target", where).split(TURN_SEPARATOR)]
    while len(pieces) > 2 and not pieces[-1].strip():
        pieces.pop()  # a closing </s> written out, or nothing after it
    unanswered = len(pieces) % 2 == 1
    turns = tuple(zip(pieces[0::2], pieces[1::2], strict=False))
    return _row(kind, turns, where, number, unanswered)


def _parse_belle(fields: Mapping[str, Any], where: str, number: int) -> Row:
    parts = [_text(fields, "instruction", where), _text(fields, "input", where)]
    question = "\n".join(part for part in parts if part)
    return _row(_kind(fields, "Belle"), ((question, _text(fields, "output", where)),), where, number)


def _parse_conversation(fields: Mapping[str, Any], where: str, number: int) -> Row:
    conversation = fields["conversation"]
    if not isinstance(conversation, list) or not conversation:
        raise FireflyError(f"{where}: 'conversation' must be a list of at least one {{human, assistant}}")
    turns = []
    for index, turn in enumerate(conversation, 1):
        if not isinstance(turn, dict):
            raise FireflyError(f"{where}: turn {index} of 'conversation' must be an object with human and assistant")
        turn_where = f"{where}, turn {index}"
        turns.append((_text(turn, "human", turn_where), _text(turn, "assistant", turn_where)))
    return _row(_kind(fields, "Conversation"), tuple(turns), where, number)


_FORMS: tuple[tuple[set[str], Callable[[Mapping[str, Any], str, int], Row]], ...] = (
    ({"kind", "input", "target"}, _parse_firefly),
    ({"instruction", "input", "output"}, _parse_belle),
    ({"conversation"}, _parse_conversation),
)


def _row(kind: str, turns: tuple[Turn, ...], where: str, number: int, unanswered: bool = False) -> Row:
    for index, (_, target) in enumerate(turns, 1):
        if not target.strip():
            turn = f" of turn {index}" if len(turns) > 1 else ""
            raise FireflyError(f"{where}: the target{turn} is empty, so there is nothing to learn; remove the row")
    return Row(kind, turns, number, unanswered)


def _kind(fields: Mapping[str, Any], default: str) -> str:
    kind = fields.get("kind", default)
    return kind if isinstance(kind, str) and kind else default


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise FireflyError(f"{where}: field {name!r} is missing; the row has {sorted(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise FireflyError(f"{where}: field {name!r} must be a string, this is {type(value).__name__}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise FireflyError(f"{where}: field {name!r} holds half a surrogate pair, which is no character; mend it")
    return value
