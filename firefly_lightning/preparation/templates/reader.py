"""Hand-written templates that turn raw task rows into instruction rows; one YAML file a kind, data only.

A file ``KIND.yaml`` holds::

    kind: NER                                  # the name of the file, and the kind of every row it gives
    description: 从一段话中找出命名实体
    fields: {text: 一段话, entities: 实体表}      # what a raw row must hold, and what it means
    optional: []                               # fields that a row may lack
    unusable: {text: [<UNK>]}                  # a row whose field holds one of these is left out, and counted
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
empty and everything under ``without`` is. ``equal: [a, b]`` and ``unequal: [a, b]`` ask besides that fields hold the
same text, or do not. ``unusable: {text: {words: [该], unless: [应该]}}`` looks for the words
where none of the longer texts is. A view is one of two things:

- ``{of: FIELD, values: {positive: 积极, …}}`` writes one text for another;
- ``{of: FIELD, each: TEXT, join: TEXT}`` writes a list without repeats. ``parts`` names the members of an item (one,
  ``item``, by default), ``values`` maps them by part (``{type: {PER: 人名}}``), ``only`` keeps items by part
  (``{type: PER}``), ``split`` cuts a field that is one text (``["*", "#"]``: into items, then parts), ``take: first``
  and ``take: rest`` part the first item from the others, ``repeats: true`` keeps repeated items, and ``empty`` is
  written when nothing is left.
"""

import difflib
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from firefly_lightning.errors import FireflyError, MissingFileError, describe_os_error, full_width_hint, reason
from firefly_lightning.files.json_object import RepeatedKeyError, check_keys
from firefly_lightning.preparation.templates.fill import TemplateGroup, Templates, Words
from firefly_lightning.preparation.templates.views import Listing, Template, ValueMap, plain_text

TEMPLATE_FOLDER = Path(__file__).parent
"""Folder of the templates that come with the package."""

_OPTIONAL_SECTIONS = ("optional", "unusable", "views")
_CONDITIONS = ("without", "equal", "unequal")


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
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder; --templates is a folder of files called KIND.yaml")
    kinds = sorted(file.stem for file in folder.glob("*.yaml"))
    if kind not in kinds:
        nearest = difflib.get_close_matches(kind.lower(), [name.lower() for name in kinds], n=1, cutoff=0.5)
        hint = "".join(f" (did you mean {name}?)" for name in kinds if name.lower() in nearest)
        known = f"{', '.join(kinds) or 'none'}; --templates names a folder of your own"
        raise FireflyError(f"{folder}: no templates for the kind {kind!r}{hint}; there are templates for {known}")
    try:
        text = path.read_text("utf-8")
        check_keys(yaml.compose(text, yaml.SafeLoader))
        return _read_file(yaml.safe_load(text), path)
    except OSError as error:
        raise FireflyError(describe_os_error(error, path)) from error
    except UnicodeDecodeError as error:
        raise FireflyError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file") from error
    except RepeatedKeyError as error:
        raise FireflyError(f"{path}: {error}; keep one of them") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: a date such as 2024-99-99
        raise FireflyError(f"{path}: not YAML: {reason(error)}{full_width_hint(path)}") from error


def _read_file(content: Any, path: Path) -> Templates:
    where = str(path)
    top = _section(content, where, ("kind", "description", "fields", "groups", "example"), _OPTIONAL_SECTIONS)
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
    marks = _mapping(top.get("unusable", {}), f"{where}: unusable")
    _check_known(marks, fields, f"{where}: unusable")
    unusable = {name: _read_words(texts, f"{where}: unusable: {name}") for name, texts in marks.items()}
    templates = Templates(path.stem, fields, frozenset(optional), views, groups, unusable)
    _check_example(templates, top["example"], f"{where}: example")
    return templates


def _read_view(content: Any, fields: Mapping[str, str], where: str) -> ValueMap | Listing:
    lists = isinstance(content, dict) and "each" in content
    optional = ("parts", "split", "values", "only", "empty", "take", "repeats") if lists else ()
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
    take, repeats, empty = view.get("take", "all"), view.get("repeats", False), str(view.get("empty", ""))
    _check_known([take], ("all", "first", "rest"), f"{where}: take")
    if not isinstance(repeats, bool):
        raise FireflyError(f"{where}: repeats: must be true or false, this is {repeats!r}")
    return Listing(view["of"], each, str(view["join"]), parts, split, values, only, empty, take, repeats)


def _read_words(content: Any, where: str) -> Words:
    if not isinstance(content, dict):
        return Words(tuple(_texts(content, where)))
    section = _section(content, where, ("words",), ("unless",))
    return Words(tuple(_texts(section["words"], where)), tuple(_texts(section.get("unless", []), f"{where}: unless")))


def _read_group(content: Any, names: Sequence[str], where: str) -> TemplateGroup:
    group = _section(content, where, ("inputs", "targets"), _CONDITIONS)
    conditions = {key: _texts(group.get(key, []), f"{where}: {key}") for key in _CONDITIONS}
    for key, named in conditions.items():
        _check_known(named, names, f"{where}: {key}")
    inputs, targets = (
        tuple(_template(text, names, f"{where}: {key}") for text in _texts(group[key], f"{where}: {key}"))
        for key in ("inputs", "targets")
    )
    if not inputs or not targets:
        raise FireflyError(f"{where}: needs at least one input and one target")
    return TemplateGroup(inputs, targets, *(frozenset(conditions[key]) for key in _CONDITIONS))


def _check_example(templates: Templates, content: Any, where: str) -> None:
    example = _section(content, where, ("row", "input", "target"))
    for name in ("input", "target"):
        plain_text(example[name], name, where)
    texts = templates.texts(_mapping(example["row"], f"{where}: row"), where)
    for group in filter(lambda group: group.serves(texts), templates.groups):
        inputs, targets = ({template.fill(texts) for template in part} for part in (group.inputs, group.targets))
        if example["input"] in inputs and example["target"] in targets:
            return
    raise FireflyError(f"{where}: no template gives this input and target from this row; correct one of them")


def _template(text: Any, names: Sequence[str], where: str) -> Template:
    plain_text(text, "template", where)
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
    return {
        plain_text(key, "key", where): plain_text(text, str(key), where) for key, text in _mapping(value, where).items()
    }
