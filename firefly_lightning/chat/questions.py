"""What the page sends: a conversation, a question and settings of generation, each checked before a model sees it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from transformers import GenerationConfig

from firefly_lightning.data.sources.row_texts import has_half_a_pair
from firefly_lightning.errors import reason
from firefly_lightning.evaluation.generation import Decoding
from firefly_lightning.files.json_object import STRICT_JSON
from firefly_lightning.prompt import Turn

MOST_BYTES = 1 << 20
"""Most bytes of a request; a conversation that no model of this size could take in is far shorter."""


class Slider(NamedTuple):
    """A setting of generation that the page offers: its range, the step between two values, and its first value."""

    least: float
    most: float
    step: float
    start: float


_RANGES: dict[str, tuple[float, float, float]] = {
    "temperature": (0, 2, 0.01),  # at 0 nothing is drawn: the likeliest token is taken
    "top_p": (0.01, 1, 0.01),
    "repetition_penalty": (1, 2, 0.01),
    "max_new_tokens": (1, 1024, 1),
}


def sliders(config: GenerationConfig) -> dict[str, Slider]:
    """The page's sliders, set to a model's own settings; a range that is too narrow for its setting is widened."""
    starts = {name: 1.0 if (own := getattr(config, name)) is None else own for name in _RANGES}
    if not config.do_sample:
        starts["temperature"] = 0
    return {
        name: Slider(min(least, starts[name]), max(most, starts[name]), step, starts[name])
        for name, (least, most, step) in _RANGES.items()
    }


class Question(NamedTuple):
    """The turns of a conversation so far, the question to answer, and the settings to answer it with."""

    turns: list[Turn]
    text: str
    decoding: Decoding


async def read_question(request: Request, offered: Mapping[str, Slider]) -> Question:
    """Reads what a request asks.

    Args:
        request: Its body is ``{"turns": [[question, answer], …], "question", "decoding": {setting: number}}``.
        offered: The settings, all of which ``decoding`` must have, with their ranges.

    Raises:
        HTTPException: If the request is of another form, with a line that says where.
    """
    # A foreign page must ask before it sends this content type, and its request to do so is not answered.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    body = await _body(request)
    try:
        fields = _object(STRICT_JSON.decode(body.decode()), ("turns", "question", "decoding"), "the body")
        values: Any = _object(fields["decoding"], tuple(offered), "decoding")
        values = {name: _value(name, values[name], slider) for name, slider in offered.items()}
        question = Question(_turns(fields["turns"]), _text(fields["question"], "question"), values)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end, or another form
        raise HTTPException(400, f"not a question: {reason(error)}") from error
    values["do_sample"] = values["temperature"] > 0
    if not values["do_sample"]:  # without sampling its settings mean nothing
        del values["temperature"], values["top_p"]
    return question


async def _body(request: Request) -> bytes:
    body, size = bytearray(), 0
    try:
        async for piece in request.stream():  # to its end: a browser that is still sending does not hear an answer
            size += len(piece)
            body += piece if size <= MOST_BYTES else b""
    except ClientDisconnect as error:
        raise HTTPException(400, "the body ends early") from error
    if size > MOST_BYTES:
        raise HTTPException(413, f"a conversation may have {MOST_BYTES:,} bytes; begin a new one")
    return bytes(body)


def _object(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"{where} must be an object of {', '.join(names)}, and nothing else")
    return value


def _turns(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        raise ValueError("turns must be a list of [question, answer]")
    return [(_text(question, "a turn's question"), _text(answer, "a turn's answer")) for question, answer in value]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text")
    if has_half_a_pair(value):
        raise ValueError(f"{where} has half of a character that takes two code units (a lone surrogate)")
    return value


def _value(name: str, value: Any, slider: Slider) -> float:
    whole = isinstance(slider.step, int)
    if isinstance(value, bool) or not isinstance(value, int | float) or not slider.least <= value <= slider.most:
        raise ValueError(f"{name} must be a number from {slider.least:g} to {slider.most:g}")
    if whole and value != int(value):
        raise ValueError(f"{name} must be a whole number")
    finest = min(slider.step, slider.start or slider.step)
    if 0 < value < finest:  # a smaller temperature would divide all logits into infinities
        raise ValueError(f"{name} must be 0, or at least {finest:g}")
    return int(value) if whole else float(value)  # transformers refuses a penalty of 1, not 1.0
