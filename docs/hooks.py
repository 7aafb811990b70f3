"""What the build of the documentation reads from the code: the keys of a configuration.

Nothing is imported but read as text, so that the site is built where neither PyTorch nor this project is installed.
In a page, ``<!-- keys GROUP of CLASS -->`` stands for the table of a constructor's arguments. Chinese descriptions are
in ``zh/keys.yaml``; a test compares them with the code.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import yaml
from mkdocs.plugins import event_priority, get_plugin_logger
from pymdownx.slugs import slugify

DOCS = Path(__file__).parent
PACKAGE = "firefly_lightning"

HEADS = {
    "en": ("flag and key", "default", "meaning"),
    "zh": ("参数和键", "默认值", "含义"),
}
DEFAULT = {"en": "By default: {}.", "zh": "默认：{}。"}
REQUIRED = {"en": "required", "zh": "必填"}
NONE = {"en": "none", "zh": "无"}

LINKED = {"tokenizer"}
"""Arguments that ``firefly-fit`` sets itself: the tokenizer is the model's."""

KEYS = re.compile(r"<!-- keys (\w+) of ([\w.]+) -->")

SHORT = 24
"""Characters of a default that fit into its column; a longer one is told with the meaning."""

_CHINESE = r"\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
_BROKEN_LINE = re.compile(rf"(?<=[{_CHINESE}])\n *(?=[{_CHINESE}`])")
"""A line that ends, and goes on, with a Chinese character."""

_ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")

_CELL_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>(?:(?!<td|<table).)*</td>)", re.DOTALL)
_PART = re.compile(r"([._/=])(?=\w)")

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
_ROLE_HTML = re.compile(r":(?:class|func|meth|mod|data|attr|exc):(?=<code)")


def on_config(config: Any) -> Any:
    """Anchors of Chinese headings are the headings, as on other sites that show Markdown."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts tables in the places of their comments."""
    return fill(markdown, page.file.locale)


@event_priority(-100)  # after the plugin that knows the languages
def on_page_context(context: Any, page: Any, config: Any, **_: Any) -> Any:
    """Lets the language switch lead to the same page, by a path that also works from the disk."""
    name = page.file.dest_uri.removeprefix("zh/")
    for other in config.extra.get("alternate", ()):
        other["link"] = name if other["lang"] == "en" else f"{other['lang']}/{name}"
    return context


def on_page_content(html: str, **_: Any) -> str:
    """Leaves out Sphinx's roles, which docstrings have; lets long names break between their parts in narrow tables."""
    return _CELL_CODE.sub(lambda found: _PART.sub(r"\1<wbr>", found[0]), _ROLE_HTML.sub("", html))


def join_lines(markdown: str) -> str:
    """Lines of a Chinese paragraph without the spaces that browsers would show between them."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _BROKEN_LINE.sub("", part) for part in parts)


def fill(markdown: str, language: str) -> str:
    """A page with its tables."""
    markdown = KEYS.sub(lambda found: keys_table(found[1], found[2], language), markdown)
    return join_lines(markdown) if language == "zh" else markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warns, which ends a strict build, of what a page would load from another host."""
    for found in _ELSEWHERE.findall(output):
        get_plugin_logger(__name__).warning(f"{page.file.src_uri} loads {found}")
    return output


@cache
def package() -> griffe.Module:
    """The package as text."""
    loader = griffe.GriffeLoader(search_paths=[str(DOCS.parent)], allow_inspection=False)
    module = loader.load(PACKAGE)
    assert isinstance(module, griffe.Module)
    return module


def arguments(path: str) -> dict[str, tuple[str, str | None, str]]:
    """Type, default and description of each argument of a constructor, in its order.

    Args:
        path: Of the class, such as ``firefly_lightning.module.FireflyModule``.
    """
    cls = package()[path.removeprefix(f"{PACKAGE}.")]
    sections = cls.docstring.parse("google", warnings=False) if cls.docstring else []
    told = {
        item.name: " ".join(_ROLE.sub(r"``\1``", item.description).split())
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
        for item in section.value
    }
    found = {}
    for one in cls.members["__init__"].parameters:
        if one.name not in {"self", *LINKED}:
            default = None if one.default is None else _value(cls, str(one.default))
            found[one.name] = (_type(one.annotation), default, told[one.name])
    return found


def keys_table(group: str, path: str, language: str) -> str:
    """Rows of a table: key and type, default, meaning."""
    translated = translations().get(group, {}) if language == "zh" else {}
    rows = []
    for name, (kind, default, meaning) in arguments(path).items():
        meaning = str(translated.get(name, meaning)).replace("|", "\\|")
        shown = REQUIRED[language] if default is None else NONE[language] if default == "None" else f"`{default}`"
        if default is not None and len(default) > SHORT:
            shown, meaning = "…", f"{meaning} {DEFAULT[language].format(f'`{default}`')}"
        rows.append((f"`{group}.{name}`<br><small>{kind}</small>", shown, meaning))
    return _table(HEADS[language], rows)


def translations() -> dict[str, Any]:
    """What ``docs/zh`` says of keys."""
    read: dict[str, Any] = yaml.safe_load((DOCS / "zh" / "keys.yaml").read_text("utf-8"))
    return read


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _type(annotation: Any) -> str:
    """A type as words; a name of this project that stands for a few texts is replaced by them."""
    found: Any = None
    if isinstance(annotation, griffe.ExprName):
        path = annotation.canonical_path
        if path.startswith(f"{PACKAGE}."):
            found = _looked_up(path)
    text = str(getattr(found, "value", None) or annotation)
    if choices := re.fullmatch(r"Literal\[(.*)\]", text):
        text = choices[1].replace("'", "").replace('"', "")
    return text.replace(" | None", "").replace(" | ", ", ").replace("[", "\\[")


def _value(cls: Any, default: str) -> str:
    """A default; a constant's name is replaced by what it holds."""
    if re.fullmatch(r"[A-Z][A-Z_]+", default):
        default = str(cls.module[default].value)
    return default.strip("'\"") if re.fullmatch(r"'[^']*'|\"[^\"]*\"", default) else default


def _looked_up(path: str) -> Any:
    try:
        return package()[path.removeprefix(f"{PACKAGE}.")]
    except KeyError:
        return None
