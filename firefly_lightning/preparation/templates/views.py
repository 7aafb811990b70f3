"""What a template is made of: texts with places, and other ways to write a field."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from firefly_lightning.data.sources.known_forms import TURN_SEPARATOR
from firefly_lightning.data.sources.row_texts import has_half_a_pair
from firefly_lightning.errors import FireflyError, shown


@dataclass(frozen=True)
class Template:
    """A text with places for values.

    Attributes:
        pieces: Pairs (text, name of the value after the text, or None), in order.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the values that the template has places for."""
        return frozenset(name for _, name in self.pieces if name is not None)

    @cached_property
    def turns(self) -> int:
        """How many turn separators the template itself has."""
        return self.fill(dict.fromkeys(self.names, "")).count(TURN_SEPARATOR)

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every value in its place, as it is: values are never read for places or anything else."""
        return "".join(text + ("" if name is None else values[name]) for text, name in self.pieces)


@dataclass(frozen=True)
class ValueMap:
    """A view that writes one text for another."""

    of: str
    values: Mapping[str, str]

    def write(self, value: Any, where: str) -> str:
        """The text that this view writes for the value of a field."""
        return _mapped(plain_text(value, self.of, where), self.values, self.of, where)


@dataclass(frozen=True)
class Listing:
    """A view that writes the items of a list; the head of ``reader.py`` says what each part means."""

    of: str
    each: Template
    join: str
    parts: Sequence[str] = ("item",)
    split: Sequence[str] = ()
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)
    empty: str = ""
    take: Literal["all", "first", "rest"] = "all"
    repeats: bool = False

    def write(self, value: Any, where: str) -> str:
        """The text that this view writes for a list, or for a text that ``split`` cuts into one."""
        if isinstance(value, str) and self.split:
            value = value.split(self.split[0]) if value.strip() else []
        if not isinstance(value, list):
            raise FireflyError(f"{where}: field {self.of!r} must be a list, this is {type(value).__name__}")
        items = [self._named_parts(item, where) for item in value]
        kept = [item for item in items if all(item[part] == wanted for part, wanted in self.only.items())]
        texts = [self.each.fill(self._map_parts(item, where)) for item in kept]
        texts = texts if self.repeats else list(dict.fromkeys(texts))
        return self.join.join({"all": texts, "first": texts[:1], "rest": texts[1:]}[self.take]) or self.empty

    def _named_parts(self, item: Any, where: str) -> dict[str, str]:
        if isinstance(item, str) and len(self.split) > 1:
            item = item.split(self.split[1])
        members = item if isinstance(item, list) else [item]
        if len(members) != len(self.parts):
            raise FireflyError(
                f"{where}: field {self.of!r}: {shown(repr(item))} must have the parts {', '.join(self.parts)}"
            )
        return {part: plain_text(member, self.of, where) for part, member in zip(self.parts, members, strict=True)}

    def _map_parts(self, item: Mapping[str, str], where: str) -> dict[str, str]:
        maps = self.values
        return {
            part: _mapped(text, maps[part], self.of, where) if part in maps else text for part, text in item.items()
        }


def _mapped(text: str, values: Mapping[str, str], name: str, where: str) -> str:
    if text not in values:
        raise FireflyError(
            f"{where}: field {name!r} holds {shown(repr(text))}; its templates know only {', '.join(values)}"
        )
    return values[text]


def plain_text(value: Any, name: str, where: str) -> str:
    """A value as text: a string as it is, a number or truth value as JSON writes it."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise FireflyError(f"{where}: field {name!r} must be text or a number, this is {type(value).__name__}")
    if has_half_a_pair(value):
        raise FireflyError(f"{where}: field {name!r} holds half a surrogate pair, which is no character; mend it")
    return value
