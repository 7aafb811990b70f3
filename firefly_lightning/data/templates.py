"""Hand-written templates that turn raw task rows into instruction rows; one YAML file a kind, data only.

A file ``KIND.yaml`` holds::

    kind: NER                                  # the name of the file, and the kind of every row it gives
    description: 从一段话中找出命名实体
    fields: {text: 一段话, entities: 实体表}      # what a raw row must hold, and what it means
    optional: []                               # fields that a row may lack
    views:                                     # other ways to write a field
      names: {of: entities, parts: [name, type], each: "{name}", join: "、"}
    groups:                                    # inputs and the targets that answer them
      - inputs: ["找出下文中的实体：{text}"]
        targets: ["{names}"]
      - without: [names]                       # only for rows where these are empty
        inputs: ["找出下文中的实体：{text}"]
        targets: ["没有实体"]
    example:                                   # checked when the file is loaded
      row: {text: 我爱北京, entities: [[北京, LOC]]}
      input: 找出下文中的实体：我爱北京
      target: 北京

``{name}`` stands for a field or a view, ``{{`` and ``}}`` for braces. A group serves a row when nothing it names is
empty and everything under ``without`` is. A view is one of two things:

- ``{of: FIELD, values: {positive: 积极, …}}`` writes one text for another;
- ``{of: FIELD, each: TEXT, join: TEXT}`` writes a list without repeats. ``parts`` names the members of an item (one,
  ``item``, by default), ``values`` maps them by part (``{type: {PER: 人名}}``), ``only`` keeps items by part
  (``{type: PER}``), ``split`` cuts a field that is one text (``["*", "#"]``: into items, then parts), and ``empty``
  is written when nothing is left.
"""

import difflib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
import yaml

from firefly_lightning.data.rows import TURN_SEPARATOR
from firefly_lightning.errors import FireflyError, describe_os_error

TEMPLATE_FOLDER = Path(__file__).with_suffix("")
"""The templates that come with the package."""


class UnusableRowError(Exception):
    """A raw row, rightly made, that has no instruction row; the message is the reason."""


class Template(NamedTuple):
    """A text with places for values.

    Attributes:
        pieces: (text, name of the value after it, or None) in order.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def names(self) -> set[str]:
        """What the template names."""
        return {name for _, name in self.pieces if name is not None}

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every value in its place, as it is: values are never read for places or anything else."""
        return "".join(text + ("" if name is None else values[name]) for text, name in self.pieces)


@dataclass(frozen=True)
class ValueMap:
    """A view that writes one text for another."""

    of: str
    values: Mapping[str, str]

    def write(self, value: Any, where: str) -> str:
        """The text for a value."""
        return _mapped(_plain(value, self.of, where), self.values, self.of, where)


@dataclass(frozen=True)
class Listing:
    """A view that writes the items of a list, each once; see the head of this file for the meaning of each part."""

    of: str
    each: Template
    join: str
    parts: Sequence[str] = ("item",)
    split: Sequence[str] = ()
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    only: Mapping[str, str] = field(default_factory=dict)
    empty: str = ""

    def write(self, value: Any, where: str) -> str:
        """The text for a list, or for a text that ``split`` cuts."""
        if isinstance(value, str) and self.split:
            value = value.split(self.split[0]) if value.strip() else []
        if not isinstance(value, list):
            raise FireflyError(f"{where}: field {self.of!r} must be a list, this is {type(value).__name__}")
        items = [self._named_parts(item, where) for item in value]
        kept = [item for item in items if all(item[part] == wanted for part, wanted in self.only.items())]
        texts = dict.fromkeys(self.each.fill(self._map_parts(item, where)) for item in kept)
        return self.join.join(texts) or self.empty

    def _named_parts(self, item: Any, where: str) -> dict[str, str]:
        if isinstance(item, str) and len(self.split) > 1:
            item = item.split(self.split[1])
        members = item if isinstance(item, list) else [item]
        if len(members) != len(self.parts):
            raise FireflyError(f"{where}: field {self.of!r}: {item!r} must have the parts {', '.join(self.parts)}")
        return {part: _plain(member, self.of, where) for part, member in zip(self.parts, members, strict=True)}

    def _map_parts(self, item: Mapping[str, str], where: str) -> dict[str, str]:
        maps = self.values
        return {
            part: _mapped(text, maps[part], self.of, where) if part in maps else text for part, text in item.items()
        }


class TemplateGroup(NamedTuple):
    """Inputs, and the targets any of which answers any of them, for the rows in which ``without`` is empty."""

    inputs: tuple[Template, ...]
    targets: tuple[Template, ...]
    without: frozenset[str] = frozenset()

    @property
    def names(self) -> set[str]:
        """What the templates of the group name."""
        return set().union(*(template.names for template in self.inputs + self.targets))

    def serves(self, texts: Mapping[str, str]) -> bool:
        """Whether nothing the group names is empty and everything under ``without`` is."""
        return all(texts[name] for name in self.names) and not any(texts[name] for name in self.without)


@dataclass(frozen=True)
class Templates:
    """The templates of one kind."""

    kind: str
    fields: Mapping[str, str]
    optional: frozenset[str]
    views: Mapping[str, ValueMap | Listing]
    groups: tuple[TemplateGroup, ...]

    def fill(
        self, row: Mapping[str, Any], where: str = "the row", *, seed: int = 0, number: int = 1, per_row: int = 1
    ) -> list[dict[str, str]]:
        """Instruction rows ``{"kind", "input", "target"}`` of one raw row.

        Which templates it gets follows from ``seed`` and ``number`` alone, on every machine and in every release of
        Python; a template added at the end leaves most rows as they were.

        Args:
            row: The raw row; fields that the file does not name are left alone.
            where: File and line, for messages.
            seed: Another seed draws other templates.
            number: Position of the row.
            per_row: How many input templates, all different; fewer where fewer serve the row.

        Raises:
            FireflyError: If a field is missing, of the wrong type, unknown to a view, or too empty for every template.
            UnusableRowError: If a value brings ``</s>`` into the target, where it would part two turns.
        """
        texts = self._texts(row, where)
        choices = [(source, group.targets) for group in self.groups if group.serves(texts) for source in group.inputs]
        if not choices:
            blank = dict.fromkeys(self._field(name) for name, text in texts.items() if not text)
            raise FireflyError(
                f"{where}: no template serves a row in which {', '.join(blank)} is empty; fill it or remove the row"
            )
        # The lowest hashes win, and the winner's hash picks the target.
        draws = sorted((_hash(seed, number, at), at) for at in range(len(choices)))[:per_row]
        drawn = [(*choices[at], draw) for draw, at in draws]
        return [self._row(source, targets[draw % len(targets)], texts) for source, targets, draw in drawn]

    def _texts(self, row: Mapping[str, Any], where: str) -> dict[str, str]:
        missing = [name for name in self.fields if name not in row and name not in self.optional]
        if missing:
            raise FireflyError(f"{where}: {self.kind} needs the field {', '.join(missing)}; the row has {sorted(row)}")
        used = set().union(*(group.names | group.without for group in self.groups))
        return {name: self._text(name, row, where) for name in (*self.fields, *self.views) if name in used}

    def _text(self, name: str, row: Mapping[str, Any], where: str) -> str:
        view, value = self.views.get(name), row.get(self._field(name))
        if value is None or value == "":
            return ""
        text = view.write(value, where) if view else _plain(value, name, where)
        return text if text.strip() else ""

    def _field(self, name: str) -> str:
        return self.views[name].of if name in self.views else name

    def _row(self, source: Template, target: Template, texts: Mapping[str, str]) -> dict[str, str]:
        filled = {"kind": self.kind, "input": source.fill(texts), "target": target.fill(texts)}
        # A template may hold several turns; a value never does. In an input </s> is ordinary text and does no harm.
        if filled["target"].count(TURN_SEPARATOR) != target.fill(dict.fromkeys(texts, "")).count(TURN_SEPARATOR):
            raise UnusableRowError("turn separator in text")
        return filled


def load_templates(kind: str, folder: Path | None = None) -> Templates:
    """Reads the templates of a kind.

    Args:
        kind: Name of the file without ``.yaml``.
        folder: Folder of ``KIND.yaml`` files; the package's own by default.

    Raises:
        FireflyError: If there is no such kind, or its file is malformed; with the file and the place.
    """
    folder = folder or TEMPLATE_FOLDER
    path = folder / f"{kind}.yaml"
    kinds = sorted(file.stem for file in folder.glob("*.yaml"))
    if kind not in kinds:
        nearest = difflib.get_close_matches(kind.lower(), [name.lower() for name in kinds], n=1, cutoff=0.5)
        hint = "".join(f" (did you mean {name}?)" for name in kinds if name.lower() in nearest)
        known = ", ".join(kinds) or "none"
        raise FireflyError(f"{folder}: no templates for the kind {kind!r}{hint}; there are templates for {known}")
    try:
        return _read_file(yaml.safe_load(path.read_text("utf-8")), path)
    except OSError as error:
        raise FireflyError(describe_os_error(error, path)) from error
    except UnicodeDecodeError as error:
        raise FireflyError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file") from error
    except yaml.YAMLError as error:
        raise FireflyError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def _read_file(content: Any, path: Path) -> Templates:
    where = str(path)
    top = _section(content, where, ("kind", "description", "fields", "groups", "example"), ("optional", "views"))
    if top["kind"] != path.stem:
        raise FireflyError(f"{where}: kind is {top['kind']!r}; it must be the name of the file, {path.stem}")
    fields = _text_map(top["fields"], f"{where}: fields")
    optional = _texts(top.get("optional", []), f"{where}: optional")
    _check_known(optional, fields, f"{where}: optional")
    views = {
        name: _read_view(view, fields, f"{where}: view {name}")
        for name, view in _mapping(top.get("views", {}), f"{where}: views").items()
    }
    names = [*fields, *views]
    if not isinstance(top["groups"], list) or not top["groups"]:
        raise FireflyError(f"{where}: groups must be a list of at least one group")
    groups = tuple(_read_group(group, names, f"{where}: group {at}") for at, group in enumerate(top["groups"], 1))
    templates = Templates(path.stem, fields, frozenset(optional), views, groups)
    _check_example(templates, top["example"], f"{where}: example")
    return templates


def _read_view(content: Any, fields: Mapping[str, str], where: str) -> ValueMap | Listing:
    lists = isinstance(content, dict) and "each" in content
    optional = ("parts", "split", "values", "only", "empty") if lists else ()
    view = _section(content, where, ("of", "each", "join") if lists else ("of", "values"), optional)
    _check_known([view["of"]], fields, where)
    if not lists:
        return ValueMap(view["of"], _text_map(view["values"], f"{where}: values"))
    parts = _texts(view.get("parts", ["item"]), f"{where}: parts")
    maps = _mapping(view.get("values", {}), f"{where}: values")
    values = {part: _text_map(of_part, f"{where}: values: {part}") for part, of_part in maps.items()}
    only = _text_map(view.get("only", {}), f"{where}: only")
    _check_known([*values, *only], parts, where)
    each = _template(view["each"], parts, f"{where}: each")
    split = _texts(view.get("split", []), f"{where}: split")
    return Listing(view["of"], each, str(view["join"]), parts, split, values, only, str(view.get("empty", "")))


def _read_group(content: Any, names: Sequence[str], where: str) -> TemplateGroup:
    group = _section(content, where, ("inputs", "targets"), ("without",))
    without = _texts(group.get("without", []), f"{where}: without")
    _check_known(without, names, f"{where}: without")
    inputs, targets = (
        tuple(_template(text, names, f"{where}: {key}") for text in _texts(group[key], f"{where}: {key}"))
        for key in ("inputs", "targets")
    )
    if not inputs or not targets:
        raise FireflyError(f"{where}: needs at least one input and one target")
    return TemplateGroup(inputs, targets, frozenset(without))


def _check_example(templates: Templates, content: Any, where: str) -> None:
    example = _section(content, where, ("row", "input", "target"))
    texts = templates._texts(_mapping(example["row"], f"{where}: row"), where)
    for group in filter(lambda group: group.serves(texts), templates.groups):
        inputs, targets = ({template.fill(texts) for template in part} for part in (group.inputs, group.targets))
        if example["input"] in inputs and example["target"] in targets:
            return
    raise FireflyError(f"{where}: no template gives this input and target from this row; correct one of them")


def _template(text: Any, names: Sequence[str], where: str) -> Template:
    try:
        parsed = list(string.Formatter().parse(text))
    except (ValueError, TypeError) as error:
        raise FireflyError(f"{where}: {text!r}: {error}; a brace that is meant is written twice") from error
    if any(specification or conversion for _, _, specification, conversion in parsed):
        raise FireflyError(f"{where}: {text!r}: a place is a name in braces and nothing more")
    template = Template(tuple((literal, name) for literal, name, _, _ in parsed))
    _check_known(template.names, names, f"{where}: {text!r}")
    return template


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    unknown = sorted({str(name) for name in names} - set(known))
    if unknown:
        raise FireflyError(f"{where}: names {', '.join(unknown)}, but there are only {', '.join(known)}")


def _section(value: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    section = _mapping(value, where)
    missing = [name for name in required if name not in section]
    if missing:
        raise FireflyError(f"{where}: {', '.join(missing)} is missing")
    _check_known(section.keys(), [*required, *optional], where)
    return section


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FireflyError(f"{where}: must be a mapping, this is {type(value).__name__}")
    return value


def _texts(value: Any, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise FireflyError(f"{where}: must be a list of texts, none of them empty")
    if len(set(texts)) < len(texts):
        raise FireflyError(f"{where}: the same text is there twice")
    return texts


def _text_map(value: Any, where: str) -> dict[str, str]:
    return {_plain(key, "key", where): _plain(text, str(key), where) for key, text in _mapping(value, where).items()}


def _hash(seed: int, number: int, index: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}:{number}:{index}".encode())


def _mapped(text: str, values: Mapping[str, str], name: str, where: str) -> str:
    if text not in values:
        raise FireflyError(f"{where}: field {name!r} holds {text!r}; its templates know only {', '.join(values)}")
    return values[text]


def _plain(value: Any, name: str, where: str) -> str:
    """A value as text: a string as it is, a number or truth value as JSON writes it."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise FireflyError(f"{where}: field {name!r} must be text or a number, this is {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise FireflyError(f"{where}: field {name!r} holds half a surrogate pair, which is no character; mend it")
    return value
