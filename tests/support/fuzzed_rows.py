"""Rows for property tests: any JSON value in any field of any form, and proper rows with one odd value."""

from typing import Any

from hypothesis import strategies as st

ODD = (
    "",
    " ",
    "\n",
    "</s>",
    "问</s>答",
    "问</s>答</s>再问",
    "\ud800",
    "[/x]",
    "\0",
    "{name}",
    "\ufeff",
    "K",
    "all",
    "$\\frac$",
    "%s",
)
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
DOCUMENT = ("text",)
FORMS = [
    ("kind", "input", "target"), ("instruction", "output"), ("conversation",), ("conversations",), ("messages",),
    DOCUMENT,
]  # fmt: skip


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
    if form == DOCUMENT:
        origins = {"title": PROPER, "url": PROPER, "meta": VALUES, "id": VALUES}
        return st.fixed_dictionaries({"text": PROPER}, optional={"kind": PROPER, **origins})
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
