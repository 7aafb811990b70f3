"""The forms that pairs are in, a prompt with a chosen and a rejected answer, and the two rows that each of them gives.

The forms are ``{input, chosen, rejected}`` with ``history`` and ``system`` as instruction rows have them, the same with
an ``instruction`` as Alpaca's rows have it, and those of TRL: ``{prompt, chosen, rejected}`` as texts or as lists of
messages, and ``{chosen, rejected}`` as whole conversations, beside which ``prompt`` may repeat the question.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from firefly_lightning.data.sources.known_forms import TURN_SEPARATOR, earlier_turns, form_of, instruction_of
from firefly_lightning.data.sources.listed_turns import ROLES, listed_turns
from firefly_lightning.data.sources.row_forms import Record, Row
from firefly_lightning.data.sources.row_texts import (
    BadRowError,
    Said,
    after_system,
    has_text,
    names_of,
    printable,
    text_of,
)
from firefly_lightning.prompt import Turn

KIND = "Preference"
"""Kind of a pair that names none."""

FORMS = "{input, chosen, rejected}, the same with prompt or instruction, or {chosen, rejected} of whole conversations"

KNOWN = frozenset({"kind", "system", "history", "instruction", "input", "prompt", "chosen", "rejected"})
"""All fields of a pair that are read."""


class Pair(NamedTuple):
    """What a record says.

    Attributes:
        before: (input, target) pairs of the turns before the last.
        question: The last input, which both answers are for.
        chosen: The better answer.
        rejected: The worse answer.
        unused: Names of the fields that hold text and are not read.
    """

    before: tuple[Turn, ...]
    question: str
    chosen: str
    rejected: str
    unused: tuple[str, ...] = ()


def is_pair(fields: Mapping[str, Any]) -> bool:
    """Whether a record is meant as a pair: it has both answers, and is no instruction row beside them."""
    if not fields.keys() >= {"chosen", "rejected"}:
        return False
    form = form_of(fields)
    # A table has the columns of all its rows in each of them.
    return form is None or None in map(fields.get, form.required)


def rows_of_pair(fields: Mapping[str, Any], number: int) -> Record:
    """Two rows of a record: the prompt with the chosen answer, and the prompt with the rejected one.

    Of each row only the last target, the answer, is learned.

    Args:
        fields: The record's fields.
        number: Its number in its source.

    Raises:
        BadRowError: If the record is no pair, or one of which nothing can be learned.
    """
    pair = read_pair(fields)
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer.strip():
            raise BadRowError(f"the {name} answer is empty, so there is nothing to compare; remove the row", "empty")
    if pair.chosen == pair.rejected:
        raise BadRowError("chosen and rejected are the same, so there is nothing to prefer; remove the row", "equal")
    return Record((_row(fields, number, pair, pair.chosen), _row(fields, number, pair, pair.rejected)), pair.unused)


def row_to_answer(fields: Mapping[str, Any], number: int) -> Record | None:
    """One row of a record, whose prompt is to be answered, with the chosen answer as its target.

    Args:
        fields: The record's fields; a prompt alone is enough.
        number: The record's number in its source.

    Returns:
        The row; None for what is no pair, such as an instruction row.

    Raises:
        BadRowError: If the record is a pair whose prompt cannot be read.
    """
    asks_only = "chosen" not in fields and "target" not in fields and fields.keys() & {"prompt", "input"}
    if "chosen" not in fields and not (asks_only and "instruction" not in fields):
        return None
    if isinstance(fields.get("prompt"), list) and fields.get("chosen") is None:
        question = listed_turns("prompt")(fields)
        if question.question is None:
            raise _no_question("prompt")
        return Record((_row(fields, number, Pair(question.turns, question.question, "", ""), ""),), question.unused)
    answers = {name: fields.get(name) for name in ("chosen", "rejected")}
    if any(answer is None for answer in answers.values()) and not isinstance(answers["chosen"], list):
        fields = {**fields, **{name: "" if answer is None else answer for name, answer in answers.items()}}
    pair = read_pair(fields)
    return Record((_row(fields, number, pair, pair.chosen),), pair.unused)


def read_pair(fields: Mapping[str, Any]) -> Pair:
    """Prompt and answers of a record in one of the forms; the answers may be empty or equal.

    Raises:
        BadRowError: If it is in none of them, or a field is not as it must be.
    """
    for name in ("chosen", "rejected"):
        if fields.get(name) is None:
            raise BadRowError(
                f"field {name!r} is missing, so this is no pair; the row has {names_of(fields)}; use {FORMS}", "no form"
            )
    pair = _listed_pair(fields) if isinstance(fields["chosen"], list) else _plain_pair(fields)
    others = [printable(name) for name, value in fields.items() if name not in KNOWN and has_text(value)]
    if not isinstance(fields.get("kind"), str) and has_text(fields.get("kind")):
        others.append("kind")
    return pair._replace(unused=(*others, *pair.unused))


def _plain_pair(fields: Mapping[str, Any]) -> Pair:
    if isinstance(fields["rejected"], list):
        raise _not_in_one_form()
    name = _asking(fields)
    answers = [_closed(text_of(fields, one)) for one in ("chosen", "rejected")]
    if isinstance(fields[name], list):
        _without_history(fields)
        asked = listed_turns(name)(fields)
    else:
        question = instruction_of(fields) if name == "instruction" else text_of(fields, name)
        asked = Said(tuple(earlier_turns(fields)), (), question)
    asked = _with_system(fields, asked)
    if asked.question is None or not asked.question.strip():
        raise _no_question(name)
    return Pair(asked.turns, asked.question, answers[0], answers[1], asked.unused)


def _asking(fields: Mapping[str, Any]) -> str:
    """The field that asks: one of prompt, instruction and input; an instruction may have its input."""
    named = [name for name in ("prompt", "instruction", "input") if fields.get(name) is not None]
    if not named:
        raise BadRowError(f"there is no input or prompt; the row has {names_of(fields)}; use {FORMS}", "no form")
    asking = [name for name in named if has_text(fields[name])]
    if "prompt" in asking and len(asking) > 1:
        raise BadRowError(f"{asking[1]} and prompt are both given; keep the one that is asked", "malformed")
    return (asking or named)[0]


def _listed_pair(fields: Mapping[str, Any]) -> Pair:
    """A pair whose answers are messages, after those of the prompt, or whole conversations with a common beginning."""
    prompt: Any = fields.get("prompt")
    asks = has_text([fields.get("input"), fields.get("instruction")]) or not isinstance(prompt, list | str | None)
    if asks or (has_text(prompt) and isinstance(prompt, str) and _begins_with_an_answer(fields["chosen"])):
        raise BadRowError("answers that are messages need a prompt of messages, or none; mend the row", "malformed")
    _without_history(fields)
    before_both = prompt if isinstance(prompt, list) else []
    both = []
    for name in ("chosen", "rejected"):
        said = fields[name]
        if not isinstance(said, list):
            raise _not_in_one_form()
        whole = listed_turns(name)({name: [*before_both, *said]})
        if whole.question is not None or not whole.turns:
            raise BadRowError(f"the last message of {name} is not by the assistant; mend the row", "no answer")
        both.append(_with_system(fields, whole))
    chosen, rejected = both
    (*before, (question, better)), (*others, (other_question, worse)) = chosen.turns, rejected.turns
    if (before, question) != (others, other_question):
        raise BadRowError("chosen and rejected answer different prompts; give both the same one", "other prompts")
    if not question.strip():
        raise _no_question("prompt" if before_both else "chosen")
    if isinstance(prompt, str) and prompt.strip() and prompt.strip() not in {one.strip() for one, _ in chosen.turns}:
        raise BadRowError("prompt is none of the questions of chosen; leave it out, or mend the row", "malformed")
    unused = tuple(dict.fromkeys((*chosen.unused, *rejected.unused)))
    return Pair(tuple(before), question, _closed(better), _closed(worse), unused)


def _begins_with_an_answer(messages: Sequence[Any]) -> bool:
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    return ROLES.get(str(first.get("role") or first.get("from"))) == "assistant"


def _without_history(fields: Mapping[str, Any]) -> None:
    if has_text(fields.get("history")):
        message = "history belongs to a prompt that is a text, not to messages; put its turns among them"
        raise BadRowError(message, "malformed")


def _with_system(fields: Mapping[str, Any], said: Said) -> Said:
    return said if fields.get("system") is None else after_system(text_of(fields, "system"), said)


def _row(fields: Mapping[str, Any], number: int, pair: Pair, answer: str) -> Row:
    turns: Sequence[Turn] = (*pair.before, (pair.question, answer))
    kind = text_of(fields, "kind") if isinstance(fields.get("kind"), str) and fields["kind"] else KIND
    return Row(kind, tuple(turns), number, False, (*(False for _ in pair.before), True) if pair.before else ())


def _closed(answer: str) -> str:
    """An answer without a closing ``</s>`` that is written out, which every row is given anyway."""
    while answer.rstrip().endswith(TURN_SEPARATOR):
        answer = answer.rstrip().removesuffix(TURN_SEPARATOR)
    return answer


def _not_in_one_form() -> BadRowError:
    return BadRowError(
        "of chosen and rejected, one is a list of messages and the other is not; give both in one form", "malformed"
    )


def _no_question(name: str) -> BadRowError:
    return BadRowError(f"{name!r} ends without a question, so there is nothing to answer; mend the row", "no question")
