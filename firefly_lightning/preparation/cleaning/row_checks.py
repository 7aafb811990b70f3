"""The kind and the texts of a row in any form, and checks of a row by itself."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from firefly_lightning.data.sources.any_record import Reading
from firefly_lightning.data.sources.text_files import COMPRESSIONS
from firefly_lightning.preparation.cleaning.duplicates import Texts, normalise

BROKEN = re.compile(
    # control characters, halves of surrogate pairs, private use, marks of a wrong decoding, invisible characters
    "[\0-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\ud800-\udfff\ue000-\uf8ff\ufffd\ufeff\u200b\U000f0000-\U0010ffff]"
    "|锟斤拷|烫烫烫|屯屯屯"
)
# Tags that rows about web pages have are not in it: a question for a <div> is answered with one.
MARKUP = re.compile(r"</?(?:br|strong|em|font|nowiki|ref)\b[^<>]*>|&(?:nbsp|lt|gt|amp|quot|#\d+);|-\{[^{}]*\}-")
REPEATED = 10
"""A target that begins with the whole input repeats it if the input has at least this many characters."""


def what_is_wrong(said: Reading, kind: str, texts: Texts, lengths: range) -> str | None:
    """The first thing that is wrong with a row by itself, or None."""
    if said.fault:
        return said.fault
    whole = texts.whole()
    if not whole.strip() or any(not target.strip() for target in texts.targets):
        return "empty"
    if BROKEN.search(whole):
        return "broken characters"
    if kind != "Program" and MARKUP.search(whole):
        return "left-over markup"
    if len(whole) < lengths.start:
        return "too short"
    if len(whole) >= lengths.stop:
        return "too long"
    if any(_repeats(normalise(question), normalise(target)) for question, target in said.turns):
        return "target repeats input"
    return None


def _repeats(question: str, target: str) -> bool:
    return question == target or (len(question) >= REPEATED and target.startswith(question))


def kind_of(said: Reading, source: str) -> str:
    """The kind that a row names, else the name of the row's form, else the name of its file."""
    return said.kind or _stem(source)


@lru_cache(64)
def _stem(source: str) -> str:
    file = Path(source)
    return Path(file.stem).stem if file.suffix in COMPRESSIONS else file.stem


def texts_of(said: Reading) -> Texts:
    """All text of a row but its kind, the same whatever form its turns are in, and the text of its targets."""
    turns = [text for turn in said.turns for text in turn]
    return Texts([*filter(None, turns), *_flat(said.others)], turns[1::2])


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield str(value)
