"""firefly chat: a conversation with a model, on the command line or on a page."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from firefly_lightning.errors import FireflyError, check_number, require
from firefly_lightning.interrupts import interruptible
from firefly_lightning.prompt import Turn

COMMANDS = {
    "/clear": "forgets what was said",
    "/help": "shows these lines",
    "/exit": "leaves, as Ctrl-D does",
}
"""What a line of a conversation may be beside a question."""


def chat(
    model: str | None = None,
    gguf: str | None = None,
    prompt: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    seed: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    web: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Talks with a model.

    Args:
        model: Folder or hub name of the model.
        gguf: File of a model that ``firefly export --gguf`` has written, in the place of a folder; it is computed by
            llama.cpp, which needs the extra ``gguf``, in the type that it has there.
        prompt: Question to answer once, on stdout; without it, a conversation of several turns begins.
        device: Device of the model, such as cpu or cuda:0; auto takes a GPU if there is one.
        dtype: Type of the weights; auto is bfloat16 on a GPU and float32 elsewhere.
        seed: Makes the answers repeatable.
        max_new_tokens: Most tokens of an answer; the model's own setting by default.
        temperature: How freely tokens are drawn, 1 as the model says; at 0 the likeliest is taken, as with ``greedy``.
        top_p: Share of the probability, above 0 and at most 1, of which tokens are drawn; the model's own by default.
        greedy: Takes the likeliest token every time, and draws nothing.
        web: Serves a page to talk on; it needs the extra ``web``.
        host: Address at which the page is served; by default nobody outside this machine reaches it.
        port: Port at which the page is served; 0 takes any that is free.

    Raises:
        FireflyError: If a setting is out of its range, the model cannot be loaded, the device is not there, or the page
            cannot be served.
    """
    if (model is None) == (gguf is None):
        raise FireflyError("--model, --gguf: name one of them, a folder or hub name, or a file for llama.cpp")
    if gguf is not None and (device, dtype) != ("auto", "auto"):
        raise FireflyError("--device, --dtype: are not for --gguf, whose file says the type; leave them out")
    decoding: Any = _decoding(max_new_tokens, temperature, top_p, greedy)
    check_number("--seed", seed, least=-(2**63), most=2**63 - 1)
    if web:
        _require_web(prompt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _take_any_character(stream)
    answer: Any
    if gguf is not None:
        from firefly_lightning.chat.llama import LlamaAnswering

        answer = LlamaAnswering(gguf, seed, max_new_tokens)
    else:
        from firefly_lightning.chat.answering import Answering

        answer = Answering(str(model), device, dtype, seed, max_new_tokens)
    if decoding:
        from firefly_lightning.evaluation.generation import change_decoding

        answer.config = change_decoding(answer.config, decoding)
    if web:
        from firefly_lightning.chat.server import serve

        serve(answer, answer.config, Path(gguf or str(model)).name or str(model), host, port)
    elif prompt is None:
        with interruptible():
            _converse(answer)
    else:
        # Where the locale could not decode the prompt on the command line, it is read as UTF-8.
        _show(answer([], os.fsencode(prompt).decode("utf-8", "replace")), [])


def _decoding(
    max_new_tokens: int | None, temperature: float | None, top_p: float | None, greedy: bool
) -> dict[str, Any]:
    """The settings of generation that differ from the model's own.

    Raises:
        FireflyError: If one is out of its range, or they do not go together.
    """
    check_number("--max_new_tokens", max_new_tokens, least=1)
    check_number("--temperature", temperature, least=0, most=100)
    check_number("--top_p", top_p, above=0, most=1)
    if temperature == 0:
        greedy, temperature = True, None
    check_number("--temperature", temperature, least=0.001)  # what is less divides by nothing
    given = {"temperature": temperature, "top_p": top_p}
    changes = {name: float(value) for name, value in given.items() if value is not None}
    if greedy and changes:
        raise FireflyError(f"--greedy draws no token: leave {' and '.join(f'--{name}' for name in changes)} out")
    return {"do_sample": not greedy, **changes} if greedy or changes else {}


def _require_web(prompt: str | None) -> None:
    """Checks, before a model is loaded, that the page can be served."""
    if prompt is not None:
        raise FireflyError("--web and --prompt are both given; leave one of them out")
    require("web", "starlette", "uvicorn")


def _converse(answer: Callable[[Sequence[Turn], str], Iterator[str]]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing
    print("/help lists what else to type, Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    turns: list[Turn] = []
    while (question := _ask()) not in (None, "/exit"):
        if question == "/clear":
            turns.clear()
        elif re.fullmatch(r"/[a-zA-Z_]+", (question or "").partition(" ")[0]):
            _help(question or "")
        elif question:
            pieces: list[str] = []
            question = question.removeprefix("/") if question.startswith("//") else question
            with contextlib.suppress(KeyboardInterrupt):
                _show(answer(turns, question), pieces)
            turns.append((question, "".join(pieces)))


def _help(typed: str) -> None:
    """Lists what may be typed beside questions, on standard error, so that answers alone are on standard output."""
    if typed != "/help":
        print(f"{typed.partition(' ')[0]}: no such command, and not sent to the model", file=sys.stderr)
    for name, text in COMMANDS.items():
        print(f"{name:8}{text}", file=sys.stderr)
    print(
        "Ctrl-C stops an answer. All else is a question, also what begins with // (one / of it is sent).",
        file=sys.stderr,
    )


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        print()
        return None


def _show(answer: Iterator[str], pieces: list[str]) -> None:
    """Prints the pieces of an answer as they come, and collects them."""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
            pieces.append(piece)
    finally:
        print(flush=True)


def _take_any_character(stream: Any) -> None:
    """Makes a stream take any character.

    A character that the terminal's encoding lacks is replaced. An encoding that lacks Chinese characters is most likely
    set wrongly, and UTF-8 takes its place.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        "你好".encode(stream.encoding)
        stream.reconfigure(errors="replace")
    except UnicodeEncodeError:
        stream.reconfigure(encoding="utf-8", errors="replace")
