"""The templates of one kind, which turn raw task rows into instruction rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import xxhash

from firefly_lightning.data.sources.known_forms import TURN_SEPARATOR
from firefly_lightning.errors import FireflyError, shown, some
from firefly_lightning.preparation.templates.views import Listing, Template, ValueMap, plain_text


class UnusableRowError(Exception):
    """Raised for a well-formed raw row that gives no instruction row; the message is the reason."""


class Words(NamedTuple):
    """Words by which a row is known to give no good instruction row.

    Attributes:
        words: The words; a row that holds one of them is left out.
        unless: Longer texts in which a word means something else, such as 应该 where 该 is looked for.
    """

    words: tuple[str, ...]
    unless: tuple[str, ...] = ()

    def in_text(self, text: str) -> str | None:
        """The first of the words that a text holds outside of the longer texts, or None."""
        for other in self.unless:
            text = text.replace(other, "\0")
        return next((word for word in self.words if word in text), None)


@dataclass(frozen=True)
class TemplateGroup:
    """Templates of inputs, and templates of targets, any of which answers any of the inputs.

    Attributes:
        inputs: Templates of the questions.
        targets: Templates of the answers.
        without: Fields and views that must be empty in a row; none by default.
        equal: Fields and views that must all hold the same text; none by default.
        unequal: Fields and views that must not all hold the same text; none by default.
    """

    inputs: tuple[Template, ...]
    targets: tuple[Template, ...]
    without: frozenset[str] = frozenset()
    equal: frozenset[str] = frozenset()
    unequal: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """The fields and views that the templates of the group name."""
        return frozenset(name for template in self.inputs + self.targets for name in template.names)

    @cached_property
    def used(self) -> frozenset[str]:
        """The fields and views of a row that decide whether the group serves it."""
        return self.names | self.without | self.equal | self.unequal

    def serves(self, texts: Mapping[str, str]) -> bool:
        """Whether the group serves a row with these texts: it has the texts that the group needs, and fields agree."""
        return self.has_texts(texts) and self.agrees(texts)

    def has_texts(self, texts: Mapping[str, str]) -> bool:
        """Whether nothing that the group names is empty, and everything under ``without`` is."""
        return all(texts[name] for name in self.names) and not any(texts[name] for name in self.without)

    def agrees(self, texts: Mapping[str, str]) -> bool:
        """Whether fields hold the same text, or do not, as the group asks."""
        if self.equal and len({texts[name] for name in self.equal}) > 1:
            return False
        return not self.unequal or len({texts[name] for name in self.unequal}) > 1


@dataclass(frozen=True)
class Templates:
    """The templates of one kind; the head of ``reader.py`` says what each part means."""

    kind: str
    fields: Mapping[str, str]
    optional: frozenset[str]
    views: Mapping[str, ValueMap | Listing]
    groups: tuple[TemplateGroup, ...]
    unusable: Mapping[str, Words] = field(default_factory=dict)

    def check_columns(self, columns: Iterable[str], where: str) -> None:
        """Checks that a source has the fields that the templates read.

        Raises:
            FireflyError: If it lacks a field that is not optional; with the fields needed and the columns there.
        """
        columns = list(columns)
        missing = [name for name in self.fields if name not in columns and name not in self.optional]
        if missing:
            needed = ", ".join(name for name in self.fields if name not in self.optional)
            raise FireflyError(
                f"{where}: {self.kind} needs the field {', '.join(missing)}; its templates read {needed}, "
                f"the row has {some(list(map(shown, columns)), 12)}; map names with --rename COLUMN=FIELD"
            )

    def fill(
        self, row: Mapping[str, Any], where: str = "the row", *, seed: int = 0, number: int = 1, per_row: int | None = 1
    ) -> list[dict[str, str]]:
        """Instruction rows ``{"kind", "input", "target"}`` of one raw row.

        Which templates the row gets follows from ``seed`` and ``number`` alone, on every machine and in every release
        of Python; a template added at the end leaves most rows as they were.

        Args:
            row: The raw row; fields that the template file does not name are left alone.
            where: File and line of the row, for messages.
            seed: Seed by which templates are drawn; another seed draws other templates.
            number: Position of the row among all rows, counted from 1.
            per_row: How many input templates to draw, all different; fewer if fewer serve the row, all of them if None.

        Raises:
            FireflyError: If a field is missing, of the wrong type, unknown to a view, or too empty for every template.
            UnusableRowError: If a value brings ``</s>`` into the target, where it would part two turns, a field
                holds what the template file calls unusable, or no template serves a row whose fields are the same or
                different as they are here.
        """
        texts = self.texts(row, where)
        self._check_usable(row)
        choices = [(source, group.targets) for group in self.groups if group.serves(texts) for source in group.inputs]
        if not choices:
            self._check_agreement(texts)
            blank = dict.fromkeys(self._field(name) for name, text in texts.items() if not text)
            raise FireflyError(
                f"{where}: no template serves a row in which {', '.join(blank)} is empty; fill it or remove the row"
            )
        # The lowest hashes win, and the winner's hash picks the target.
        draws = [xxhash.xxh3_64_intdigest(b"%d:%d:%d" % (seed, number, at)) for at in range(len(choices))]
        winners = [min(draws)] if per_row == 1 else sorted(draws)[:per_row]
        drawn = [(*choices[draws.index(draw)], draw) for draw in winners]
        return [self._row(source, targets[draw % len(targets)], texts) for source, targets, draw in drawn]

    def texts(self, row: Mapping[str, Any], where: str) -> dict[str, str]:
        """The text that every field and view named by a template has in a row.

        Raises:
            FireflyError: If a field is missing, of the wrong type or unknown to a view.
        """
        self.check_columns(row, where)
        return {name: self._text(name, row, where) for name in self._used}

    def _check_agreement(self, texts: Mapping[str, str]) -> None:
        for group in self.groups:
            if group.has_texts(texts):
                names = " and ".join(sorted(group.unequal or group.equal))
                raise UnusableRowError(f"{names} are {'the same' if group.unequal else 'different'}")

    @cached_property
    def _used(self) -> list[str]:
        used = {name for group in self.groups for name in group.used}
        return [name for name in (*self.fields, *self.views) if name in used]

    def _check_usable(self, row: Mapping[str, Any]) -> None:
        for name, words in self.unusable.items():
            if word := words.in_text(str(row.get(name, ""))):
                raise UnusableRowError(f"{name} holds {word}")

    def _text(self, name: str, row: Mapping[str, Any], where: str) -> str:
        view, value = self.views.get(name), row.get(self._field(name))
        if value is None or value == "":
            return ""
        text = view.write(value, where) if view else plain_text(value, name, where)
        return text if text.strip() else ""

    def _field(self, name: str) -> str:
        return self.views[name].of if name in self.views else name

    def _row(self, source: Template, target: Template, texts: Mapping[str, str]) -> dict[str, str]:
        filled = {"kind": self.kind, "input": source.fill(texts), "target": target.fill(texts)}
        # A template may hold several turns; a value never does. In an input </s> is ordinary text and does no harm.
        if filled["target"].count(TURN_SEPARATOR) != target.turns:
            raise UnusableRowError("turn separator in text")
        return filled
