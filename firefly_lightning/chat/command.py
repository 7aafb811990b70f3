"""firefly chat: a conversation with a model, on the command line or on a page."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from firefly_lightning.errors import FireflyError
from firefly_lightning.interrupts import interruptible
from firefly_lightning.prompt import Turn


def chat(
    model: str,
    prompt: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    seed: int | None = None,
    max_new_tokens: int | None = None,
    web: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Talks with a model.

    Args:
        model: Folder or hub name of the model.
        prompt: Question to answer once, on stdout; without it, a conversation of several turns begins.
        device: Device of the model, such as cpu or cuda:0; auto takes a GPU if there is one.
        dtype: Type of the weights; auto is bfloat16 on a GPU and float32 elsewhere.
        seed: Makes the answers repeatable.
        max_new_tokens: Most tokens of an answer; the model's own setting by default.
        web: Serves a page to talk on; it needs the extra ``web``.
        host: Address at which the page is served; by default nobody outside this machine reaches it.
        port: Port at which the page is served; 0 takes any that is free.

    Raises:
        FireflyError: If the model cannot be loaded, the device is not there, or the page cannot be served.
    """
    if web:
        _require_web(prompt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _take_any_character(stream)
    from firefly_lightning.chat.answering import Answering

    answer = Answering(model, device, dtype, seed, max_new_tokens)
    if web:
        from firefly_lightning.chat.server import serve

        serve(answer, answer.config, Path(model).name or model, host, port)
    elif prompt is None:
        with interruptible():
            _converse(answer)
    else:
        # Where the locale could not decode the prompt on the command line, it is read as UTF-8.
        _show(answer([], os.fsencode(prompt).decode("utf-8", "replace")), [])


def _require_web(prompt: str | None) -> None:
    """Checks, before a model is loaded, that the page can be served."""
    if prompt is not None:
        raise FireflyError("--web and --prompt are both given; leave one of them out")
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise FireflyError(f'{package} is not installed; run pip install "firefly-lightning[web]"')


def _converse(answer: Callable[[Sequence[Turn], str], Iterator[str]]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing
    print("/clear forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer.", file=sys.stderr)
    turns: list[Turn] = []
    while (question := _ask()) not in (None, "/exit"):
        if question == "/clear":
            turns.clear()
        elif question:
            pieces: list[str] = []
            with contextlib.suppress(KeyboardInterrupt):
                _show(answer(turns, question), pieces)
            turns.append((question, "".join(pieces)))


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
