"""What any record says: a row in one of the forms, a pair of answers, or a raw row; also where something is wrong."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from firefly_lightning.data.sources.known_forms import form_of, raw_or_firefly
from firefly_lightning.data.sources.pair_forms import KIND, KNOWN, is_pair, rows_of_pair
from firefly_lightning.data.sources.row_forms import Record, nothing_to_learn
from firefly_lightning.data.sources.row_texts import BadRowError, text_of
from firefly_lightning.prompt import Turn


class Reading(NamedTuple):
    """What a record says, whatever is wrong with it.

    Attributes:
        kind: The kind that the record names, else the name of its form; None where neither is known.
        turns: (input, target) pairs; empty for a raw row, and for a row that has a fault.
        others: Values of the fields that are neither a part of the turns nor the kind.
        fault: Why no turns can be read though the row is in a known form, in a word or two; None where they can.
        raw: Whether the record is in no form that training reads.
    """

    kind: str | None
    turns: tuple[Turn, ...]
    others: list[Any]
    fault: str | None = None
    raw: bool = False


def read_leniently(fields: Mapping[str, Any]) -> Reading:
    """What a record says: its turns where it is a row in a known form, the values of its fields where not (a raw row).

    A Firefly row needs no kind here, since the templates that build rows are given the kind apart. The turns of a pair
    end with the chosen answer; the rejected one is among the other values.
    """
    if is_pair(fields):
        return _read_pair(fields)
    form = form_of(fields)
    raw = form is None
    if form is None and (form := raw_or_firefly(fields)):
        fields = {**fields, "kind": ""}
    if form is None:
        return Reading(_named_kind(fields), (), _values(fields, {"kind"}), raw=True)
    try:
        kind, said = form.kind(fields), form.read(fields)
        if not said.turns:
            raise nothing_to_learn()
    except BadRowError as error:
        return Reading(_named_kind(fields) or form.name, (), _values(fields, {"kind"}), error.fault, raw)
    return Reading(kind, said.turns, _values(fields, form.known), raw=raw)


def answers_of_pair(fields: Mapping[str, Any], number: int) -> Record | None:
    """The two rows of a pair; None for a record in any other form.

    Raises:
        BadRowError: If it is a pair of which nothing can be learned.
    """
    return rows_of_pair(fields, number) if is_pair(fields) else None


def _read_pair(fields: Mapping[str, Any]) -> Reading:
    try:
        chosen, rejected = rows_of_pair(fields, 0).rows
    except BadRowError as error:
        return Reading(_named_kind(fields) or KIND, (), _values(fields, {"kind"}), error.fault)
    return Reading(chosen.kind, chosen.turns, [rejected.turns[-1][1], *_values(fields, KNOWN)])


def _named_kind(fields: Mapping[str, Any]) -> str | None:
    """The kind that a record names; None where it names none, or none that is proper text."""
    try:
        return text_of(fields, "kind") or None
    except BadRowError:
        return None


def _values(fields: Mapping[str, Any], known: set[str] | frozenset[str]) -> list[Any]:
    return [value for name, value in fields.items() if name not in known]
