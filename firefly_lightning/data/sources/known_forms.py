"""The forms that rows to learn are in: by which fields each is recognised, and which turns it holds.

A form is an entry of ``_FORMS``. A field that a form does not read is named in ``Said.unused`` where it holds text, so
that nothing a user wrote is passed over in silence.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from firefly_lightning.data.sources.listed_turns import listed_turns
from firefly_lightning.data.sources.row_texts import (
    BadRowError,
    Said,
    after_system,
    document_of,
    has_text,
    names_of,
    printable,
    text_of,
)
from firefly_lightning.errors import some
from firefly_lightning.prompt import Turn

TURN_SEPARATOR = "</s>"
"""Text that separates the later turns inside the ``target`` of a published Firefly row."""


@dataclass(frozen=True)
class Form:
    """One form that rows are in.

    Attributes:
        shown: How messages show the form.
        required: Fields by which the form is recognised.
        turns: Function that reads a row's turns.
        name: Kind of a row that names none; None where every row must name its kind.
        optional: Fields of the turns that may be missing or null.
        asks: Fields (question, answer) of a row that can be answered though it lacks all but the question; None where
            questions are in a list.
        beside: Fields beside those of the form that may hold text, without which a row is in the form; None for all.
    """

    shown: str
    required: frozenset[str]
    turns: Callable[[Mapping[str, Any]], Said]
    name: str | None = None
    optional: frozenset[str] = frozenset()
    asks: tuple[str, str] | None = None
    beside: frozenset[str] | None = None

    def kind(self, fields: Mapping[str, Any]) -> str:
        """The kind of a row in this form."""
        if self.name is None:
            return text_of(fields, "kind")
        return text_of(fields, "kind") if isinstance(fields.get("kind"), str) and fields["kind"] else self.name

    def read(self, fields: Mapping[str, Any]) -> Said:
        """The turns of a row in this form, the system text before the first question, and what is not used.

        Raises:
            BadRowError: If a field of the turns is not as it must be.
        """
        said = self.turns(fields)
        if fields.get("system") is not None and "system" in self.optional:
            said = after_system(text_of(fields, "system"), said)
        if not fields.keys() <= self.known:
            others = [printable(name) for name, value in fields.items() if name not in self.known and has_text(value)]
            said = said._replace(unused=(*others, *said.unused))
        if self.name and not isinstance(fields.get("kind"), str) and has_text(fields.get("kind")):
            said = said._replace(unused=("kind", *said.unused))
        return said

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a record has the fields of the form, and no text beside them that would make it another's."""
        return self.required <= fields.keys() and not self.foreign(fields)

    def foreign(self, fields: Mapping[str, Any]) -> list[str]:
        """Names of the fields with text that no row in this form has."""
        if self.beside is None:
            return []
        others = fields.keys() - self.known - self.beside
        return [printable(name) for name in fields if name in others and has_text(fields[name])]

    @cached_property
    def known(self) -> frozenset[str]:
        """All fields that the form reads."""
        return self.required | self.optional | {"kind"}


def form_of(fields: Mapping[str, Any]) -> Form | None:
    """The first form whose fields a record has, preferably none of them null: a table has every column in every row."""
    with_nulls = None
    for form in _FORMS:
        if form.fits(fields):
            if None not in fields.values() or None not in map(fields.get, form.required):
                return form
            with_nulls = with_nulls or form
    return with_nulls


def raw_or_firefly(fields: Mapping[str, Any]) -> Form | None:
    """The Firefly form where a record has all of it but the kind, which the templates of raw rows are given apart."""
    return _FIREFLY if {*fields, "kind"} >= _FIREFLY.required else None


def with_open_target(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a row that is to be answered, with an empty target where it has none."""
    form = form_of(fields)
    if form is None:
        form = next((one for one in (_BELLE, _FIREFLY) if one.asks and fields.get(one.asks[0]) is not None), None)
    if form is None:
        return fields
    if form.asks:
        given = {**fields, form.asks[1]: ""} if fields.get(form.asks[1]) is None else fields
        return {**given, "kind": "Firefly"} if form is _FIREFLY and not given.get("kind") else given
    (name,) = form.required
    turns = fields[name]
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        last = turns[-1]
        if last.get("human") is not None and last.get("assistant") is None:
            return {**fields, name: [*turns[:-1], {**last, "assistant": ""}]}
    return fields


def no_form(fields: Mapping[str, Any]) -> str:
    """What is wrong with a record that is in none of the forms."""
    *others, last = (form.shown for form in _FORMS)
    forms = f"{', '.join(others)} or {last}"
    for form in _FORMS:  # what lacks one field only was meant to be in this form
        missing = form.required - fields.keys()
        if len(missing) == 1 < len(form.required):
            return f"field {next(iter(missing))!r} is missing; the row has {names_of(fields)}; use {forms}"
    if fields.keys() >= {"chosen", "rejected"}:
        return (
            "the row is a pair of a chosen and a rejected answer, which firefly_lightning.PreferenceDataModule reads; "
            f"name that as data.class_path; else use {forms}"
        )
    if _DOCUMENT.required <= fields.keys() and (beside := _DOCUMENT.foreign(fields)):
        return (
            f"the row is no document, since there is text beside 'text', in {some(beside)}; make instruction rows of "
            f"such rows with firefly build, or leave that out; else use {forms}"
        )
    return f"fields {names_of(fields)} are none of the accepted forms; use {forms}"


def _firefly_turns(fields: Mapping[str, Any]) -> Said:
    question, target = text_of(fields, "input"), text_of(fields, "target")
    if TURN_SEPARATOR not in target and "history" not in fields:  # nearly all rows, sooner
        return Said(((question, target),))
    pieces = [question, *target.split(TURN_SEPARATOR)]
    while len(pieces) > 2 and not pieces[-1].strip():
        pieces.pop()  # a closing </s> written out, or nothing after it
    last = pieces.pop() if len(pieces) % 2 else None
    return Said((*earlier_turns(fields), *zip(pieces[0::2], pieces[1::2], strict=True)), (), last)


def _belle_turns(fields: Mapping[str, Any]) -> Said:
    return Said((*earlier_turns(fields), (instruction_of(fields), text_of(fields, "output"))))


def instruction_of(fields: Mapping[str, Any]) -> str:
    """What is asked by an instruction and its input, which may be missing or null."""
    parts = [text_of(fields, "instruction"), "" if fields.get("input") is None else text_of(fields, "input")]
    return "\n".join(filter(None, parts))


def earlier_turns(fields: Mapping[str, Any]) -> Iterator[Turn]:
    """Earlier turns of a row: a list of [question, answer]; null and an empty text, as of a table, mean none."""
    history = fields.get("history")
    if not history and (history is None or history == "" or history == []):
        return
    if not isinstance(history, list | tuple):
        message = f"'history' must be a list of [question, answer], this is {type(history).__name__}; mend the row"
        raise BadRowError(message, "malformed")
    for index, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRowError(f"turn {index} of 'history' must be [question, answer]; mend the row", "malformed")
        both = {"question": pair[0], "answer": pair[1]}
        place = f", turn {index} of 'history'"
        yield text_of(both, "question", place), text_of(both, "answer", place)


def _document(fields: Mapping[str, Any]) -> Said:
    return document_of(text_of(fields, "text"))


_AROUND = frozenset({"system", "history"})

_ORIGINS = frozenset(
    (
        "id", "_id", "uuid", "uid", "url", "uri", "link", "title", "source", "source_domain", "domain", "site", "host",
        "publisher", "author", "path", "file", "file_name", "filename", "file_path", "date", "time", "timestamp",
        "created", "added", "updated", "published", "crawl", "dump", "snapshot", "version", "dataset", "subset",
        "split", "corpus", "lang", "language", "license", "licence", "copyright", "digest", "hash", "meta", "metadata",
    )
)  # fmt: skip
"""Fields in which data sets of texts say where and when a text was found."""

_FIREFLY = Form(
    "{kind, input, target}",
    frozenset({"kind", "input", "target"}),
    _firefly_turns,
    optional=_AROUND,
    asks=("input", "target"),
)
_BELLE = Form(
    "{instruction, output} with or without input",
    frozenset({"instruction", "output"}),
    _belle_turns,
    "Belle",
    _AROUND | {"input"},
    ("instruction", "output"),
)
_DOCUMENT = Form("{text}", frozenset({"text"}), _document, "Text", beside=_ORIGINS)
_FORMS = (
    _FIREFLY,
    _BELLE,
    *(
        Form(shown, frozenset({name}), listed_turns(name), "Conversation", frozenset({"system"}))
        for name, shown in (
            ("conversation", "{conversation: [{human, assistant}, …]}"),
            ("messages", "{messages: [{role, content}, …]}"),
            ("conversations", "{conversations: [{from, value}, …]}"),
        )
    ),
    _DOCUMENT,
)
