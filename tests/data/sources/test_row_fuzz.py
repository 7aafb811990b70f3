"""Any JSON value in any field of any form: a row is read or refused in one line, and nothing of it is lost unsaid.

``FIREFLY_FUZZ_SECONDS=3600 pytest tests/data/sources/test_row_fuzz.py`` looks for an hour.
"""

import contextlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly_lightning.data.sources.known_forms import form_of
from firefly_lightning.data.sources.row_forms import Row, RowReader, RowRules, read_leniently, read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.clean import clean

SECONDS = float(os.environ.get("FIREFLY_FUZZ_SECONDS", "0"))

ODD = ("", " ", "\n", "</s>", "问</s>答", "问</s>答</s>再问", "\ud800", "[/x]", "\0", "{name}", "\ufeff", "K", "all")
WORDS = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=[]), max_size=8))
NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats())
VALUES = st.recursive(
    st.one_of(NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)


PROPER = st.one_of(
    st.text("春风又绿江南岸ab", min_size=1, max_size=12), st.sampled_from(["</s>", "[/x]", "{name}", "\0问"])
)
NOTES = {"note": VALUES, "name": VALUES}
FLAGS = {
    "weight": st.sampled_from([0, 1, 0.0, None]),
    "train": st.sampled_from([True, False]),
    "loss": st.sampled_from([True, False]),
}
SPEAKERS = [("user", "assistant"), ("human", "gpt"), ("human", "bing")]
FORMS = [("kind", "input", "target"), ("instruction", "output"), ("conversation",), ("conversations",), ("messages",)]


def flagged(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """A turn with its notes, and one flag at most, since two may disagree."""
    plain = st.fixed_dictionaries(fields, optional=NOTES)
    marked = [st.fixed_dictionaries({**fields, name: flag}, optional=NOTES) for name, flag in FLAGS.items()]
    return st.one_of(plain, *marked)


@st.composite
def exchange(draw: Any) -> list[dict]:
    """Turns as they should be: whole ones, or a system text, questions and answers in turn, maybe an open question."""
    if draw(st.booleans()):
        return draw(st.lists(flagged({"human": PROPER, "assistant": PROPER}), min_size=1, max_size=3))
    who, said = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    asks, answers = draw(st.sampled_from(SPEAKERS))
    parts = st.lists(
        st.fixed_dictionaries({"type": st.just("text"), "text": PROPER}, optional=NOTES), min_size=1, max_size=2
    )
    content = st.one_of(PROPER, PROPER, parts)
    items = [draw(st.fixed_dictionaries({who: st.just("system"), said: content}, optional=NOTES))] * draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        items.append(draw(st.fixed_dictionaries({who: st.just(asks), said: content}, optional=NOTES)))
        items.append(draw(flagged({who: st.just(answers), said: content})))
    return items[: len(items) - draw(st.booleans())]


@st.composite
def spoilt(draw: Any, record: dict[str, Any]) -> dict[str, Any]:
    """A record in which one value, at any depth, is another one."""
    places = [(record, name) for name in record]
    for holder, at in places:
        inner = holder[at]
        places += (
            [(inner, key) for key in (inner if isinstance(inner, dict) else range(len(inner)))]
            if inner and isinstance(inner, dict | list)
            else []
        )
    if places:
        holder, at = draw(st.sampled_from(places))
        holder[at] = draw(VALUES)
    return record


def proper(form: tuple[str, ...]) -> st.SearchStrategy:
    """A row as it should be, in one form, with notes that no form reads."""
    texts = st.one_of(PROPER, PROPER, st.sampled_from(["问</s>答", "问</s>答</s>再问"]))
    fields = {name: exchange() if len(form) == 1 else texts for name in form}
    around = {
        "kind": PROPER,
        "system": PROPER,
        "history": st.lists(st.lists(PROPER, min_size=2, max_size=2), max_size=2),
    }
    others = {name: value for name, value in {**around, "input": PROPER, **NOTES}.items() if name not in form}
    if len(form) == 1:
        del others["history"]
    return st.fixed_dictionaries(fields, optional=others)


def wild(form: tuple[str, ...]) -> st.SearchStrategy:
    """A row in one form with any values."""
    names = [name for one in FORMS for name in one if name not in form]
    optional = dict.fromkeys((*names, "system", "history", *NOTES), VALUES)
    return st.fixed_dictionaries({name: st.one_of(VALUES, PROPER) for name in form}, optional=optional)


ROWS = st.one_of(*map(proper, FORMS))
RECORD = st.one_of(ROWS, ROWS.flatmap(spoilt), *map(wild, FORMS), st.dictionaries(WORDS, VALUES, max_size=3))


def texts_in(value: Any, within: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Each text in a value that is more than blanks, with the names of the fields that it lies in."""
    if isinstance(value, str):
        return [(within, value)] if value.strip() else []
    if isinstance(value, dict):
        return [one for name, inner in value.items() for one in texts_in(inner, (*within, name))]
    return [one for inner in value for one in texts_in(inner, within)] if isinstance(value, list) else []


def check_kept(fields: dict[str, Any], row: Row, unused: set[str]) -> None:
    """Checks that each text of a row that was read is learned or asked, or that its field is named as not read."""
    read = [text for turn in row.turns for text in turn]
    for within, text in texts_in(fields, ()):
        names = {".".join(within[:depth]) for depth in (1, 2, 3)}
        if {name.encode("utf-8", "backslashreplace").decode() for name in names} & unused:
            continue
        if within == ("kind",) or (len(within) > 1 and within[-1] in ("role", "from", "type")):
            continue
        pieces = [piece for piece in text.split("</s>") if piece.strip()] if within == ("target",) else [text]
        lost = [piece for piece in pieces if not any(piece in one for one in read)]
        assert len(lost) <= row.unanswered, (fields, lost)


def one_line_of(error: FireflyError) -> None:
    message = str(error)
    message.encode()
    assert "\n" not in message, message
    assert len(message) < 1500, message


def check_readers(path: Path, fields: dict[str, Any]) -> bool:
    """Checks one row by itself; returns whether training takes it."""
    path.write_text(json.dumps(fields) + "\n")
    said, reader, rows, refused = read_leniently(fields), RowReader(str(path)), [], ""
    try:
        rows = list(reader)
    except FireflyError as error:
        one_line_of(error)
        refused = str(error)
    if refused:
        empty = any(not answer.strip() for _, answer in said.turns)
        assert said.fault or empty or not said.turns or "'kind' is missing" in refused, (fields, refused)
    else:
        check_kept(fields, rows[0], set(reader.unused))
        assert (said.fault, said.turns, said.kind or "") == (None, rows[0].turns, rows[0].kind)
    for rules in (RowRules(answering=True), RowRules(learn="last", answering=True)):
        with contextlib.suppress(FireflyError):
            (asked,) = RowReader(str(path), rules)
            assert not asked.learned or any(asked.learned), "a row that is to be answered has a question"
            assert len(asked.learned) in (0, len(asked.turns))
    return bool(rows)


def check_clean(path: Path, records: list[dict[str, Any]], taken: list[bool]) -> None:
    """Checks that cleaning counts every row, and writes as they were only rows that training takes, or raw ones."""
    good = {"kind": "K", "input": "第一问", "target": "第一答"}
    path.write_text("".join(json.dumps(fields) + "\n" for fields in [good, *records]))
    counting = RowReader(str(path), RowRules(counting_faults=True))
    assert len(list(counting)) + sum(counting.faults.values()) == 1 + len(records)
    path.write_text("".join(json.dumps(fields) + "\n" for fields in records))
    out = path.with_name("out.jsonl")
    out.unlink(missing_ok=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            clean([str(path)], str(out))
    except FireflyError as error:
        one_line_of(error)
        assert not out.exists()
        return
    report = json.loads(out.with_name("out.jsonl.report.json").read_text("utf-8"))
    assert sum(report["counts"]["all"].values()) == 2 * len(records)
    kept = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert len(kept) == report["counts"]["all"]["kept"]
    written = iter(json.dumps(fields) for fields in records)
    assert all(any(json.dumps(row) == one for one in written) for row in kept)
    acceptable = {
        json.dumps(fields) for fields, ok in zip(records, taken, strict=True) if ok or form_of(fields) is None
    }
    assert {json.dumps(row) for row in kept} <= acceptable


def test_any_value_in_any_field_is_read_or_told(tmp_path):
    @settings(max_examples=200, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(RECORD, min_size=1, max_size=4))
    def check(records: list[dict[str, Any]]) -> None:
        path = tmp_path / "rows.jsonl"
        check_clean(path, records, [check_readers(path, fields) for fields in records])

    end = time.monotonic() + SECONDS
    check()
    while time.monotonic() < end:
        check()


def test_forms_of_the_fuzz_are_those_that_are_read(tmp_path):
    """A form without a row in the fuzz would be tested by nobody."""
    examples = [
        {name: [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}] if len(form) == 1 else "问"
         for name in form}
        for form in FORMS
    ]  # fmt: skip
    assert {form_of(row).shown for row in examples} == {form.shown for form in all_forms()}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    assert len(list(read_rows(str(path)))) == len(FORMS)


def all_forms():
    from firefly_lightning.data.sources import known_forms

    return known_forms._FORMS
