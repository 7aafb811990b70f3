"""Turns that a row lists: as whole turns, as messages with a role, or with the name of who says them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from firefly_lightning.data.sources.row_texts import (
    SYSTEM_SEPARATOR,
    BadRowError,
    Said,
    after_system,
    has_text,
    printable,
    text_of,
)
from firefly_lightning.prompt import Turn

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
"""Who speaks, by the names that data sets have for it."""

FLAGS = ("weight", "train", "loss")
"""Names of the field of a turn that says whether its answer is learned, as OpenAI, Axolotl and ms-swift have it."""

STYLES = (("human", "assistant"), ("role", "content"), ("from", "value"))
"""The fields of an item of a list: of a whole turn, or of a message and who says it."""


def listed_turns(name: str) -> Callable[[Mapping[str, Any]], Said]:
    """A function that reads the turns of the form whose field ``name`` lists them."""

    def read(fields: Mapping[str, Any]) -> Said:
        items = fields[name]
        if not isinstance(items, list) or not items:
            message = (
                f"{name!r} must be a list of at least one {{human, assistant}}, {{role, content}} or {{from, value}}"
            )
            raise BadRowError(message, "malformed" if items else "empty")
        unused: dict[str, None] = {}
        return _assemble(_messages(items, name, unused))._replace(unused=tuple(unused))

    return read


class _Message(NamedTuple):
    """What one of the two says, or the system: its place in the row, and whether it is learned."""

    place: str
    role: str
    text: str
    learned: bool


def _messages(items: Sequence[Any], name: str, unused: dict[str, None]) -> Iterator[_Message]:
    """The messages of a conversation; adds the names of fields that hold text and are not read to ``unused``."""
    for index, item in enumerate(items, 1):
        place, style = f", turn {index}", _style_of(item)
        if style is None:
            fields = "human and assistant, role and content, or from and value"
            raise BadRowError(f"turn {index} of {name!r} must be an object with {fields}", "malformed")
        unused.update(_others(item, (*style, *FLAGS), name))
        if style == STYLES[0]:
            yield _Message(place, "user", text_of(item, "human", place), False)
            yield _Message(place, "assistant", text_of(item, "assistant", place), _is_learned(item, True, place))
        else:
            said = text_of(item, style[0], place)
            if said not in ROLES:
                known = ", ".join(ROLES)
                raise BadRowError(f"{said[:40]!r} is none of the known roles {known}; mend the row", "malformed", place)
            answers = ROLES[said] == "assistant"
            for part in item[style[1]] if isinstance(item.get(style[1]), list) else ():
                unused.update(_others(part, ("type", "text"), f"{name}.{style[1]}"))
            yield _Message(place, ROLES[said], _content(item, style[1], place), _is_learned(item, answers, place))


def _others(item: Any, known: Sequence[str], name: str) -> dict[str, None]:
    """The names of the fields of a part of ``name`` that hold text and are not known."""
    fields = item.items() if isinstance(item, dict) else ()
    return {f"{name}.{printable(str(key))}": None for key, value in fields if key not in known and has_text(value)}


def _style_of(item: Any) -> tuple[str, str] | None:
    """The fields that an item of a conversation has; a table may have those of all styles, most of them null."""
    if not isinstance(item, dict):
        return None
    for style in STYLES:
        if any(item.get(name) is not None for name in style):
            return style
    return next((style for style in STYLES if item.keys() >= {*style}), None)


def _content(item: Mapping[str, Any], name: str, place: str) -> str:
    """The text of a message: a text, or a list of parts that are all texts, one after another."""
    parts = item.get(name)
    if not isinstance(parts, list):
        return text_of(item, name, place)
    for index, part in enumerate(parts, 1):
        if not isinstance(part, dict) or part.get("type") != "text":
            message = f"part {index} of {name!r} is no {{type: text, text}}, and only text is read; remove the row"
            raise BadRowError(message, "not text", place)
    return "".join(text_of(part, "text", place) for part in parts)


def _is_learned(item: Mapping[str, Any], answers: bool, place: str) -> bool:
    """Whether the answer of a turn is learned, as the flag of its own says; without one it is."""
    said = set()
    for name in FLAGS:
        value = item.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            shown = f"{value!r:.20}" if isinstance(value, int | float) else type(value).__name__
            message = f"{name!r} is {shown}, and only 0 and 1, or false and true, are taken; mend the row"
            raise BadRowError(message, "malformed", place)
        if value and not answers:
            message = f"{name!r} asks to learn what is no answer; only answers are learned, so leave it out"
            raise BadRowError(message, "malformed", place)
        said.add(bool(value))
    if len(said) > 1:
        raise BadRowError(f"{' and '.join(FLAGS)} of one turn disagree; keep one of them", "malformed", place)
    return answers and said != {False}


def _assemble(messages: Iterator[_Message]) -> Said:
    system: list[str] = []
    turns: list[Turn] = []
    learned: list[bool] = []
    question: str | None = None
    for message in messages:
        if message.role == "system":
            if turns or question is not None:
                raise BadRowError("a system text must come before the first question", "malformed", message.place)
            system.append(message.text)
        elif message.role == "user":
            if question is not None:
                fault = "two questions follow one another; join them, or remove the row"
                raise BadRowError(fault, "malformed", message.place)
            question = message.text
        else:
            if question is None:
                fault = "an answer must follow a question; remove the row, or the answer"
                raise BadRowError(fault, "malformed", message.place)
            turns.append((question, message.text))
            learned.append(message.learned)
            question = None
    said = Said(tuple(turns), () if all(learned) else tuple(learned), question)
    return after_system(SYSTEM_SEPARATOR.join(filter(None, system)), said)
