"""firefly chat: a conversation with a model, on the command line or on a page."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BloomForCausalLM, GenerationConfig

from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.evaluation.generation import default_decoding, generate_stream
from firefly_lightning.huggingface import check_sizes, load_bloom, load_prompt_format, load_tokenizer
from firefly_lightning.prompt import PRESETS, PromptEncoder, Turn


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
        model: Folder or hub name.
        prompt: Answers this once, on stdout; without it, a conversation of several turns.
        device: Such as cpu or cuda:0; auto takes a GPU if there is one.
        dtype: Type of the weights; auto is bfloat16 on a GPU and float32 elsewhere.
        seed: Makes the answers repeatable.
        max_new_tokens: Longest answer; the model's own setting by default.
        web: Serves a page to talk on; it needs the extra ``web``.
        host: Where the page is served; by default nobody outside this machine reaches it.
        port: Likewise; 0 is any that is free.

    Raises:
        FireflyError: If the model cannot be loaded, the device is not there, or the page cannot be served.
    """
    if web:
        _require_web(prompt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _take_any_character(stream)
    bloom, encoder = _load(model, device, dtype)
    config = default_decoding(bloom)
    config.max_new_tokens = max_new_tokens or config.max_new_tokens

    def answer(turns: Sequence[Turn], question: str, config: GenerationConfig = config) -> Iterator[str]:
        return generate_stream(bloom, encoder, turns, question, config, seed)

    if web:
        from firefly_lightning.chat.server import serve

        serve(answer, config, Path(model).name or model, host, port)
    elif prompt is None:
        _converse(answer)
    else:
        # What the locale could not decode from the command line is UTF-8 after all.
        _show(answer([], os.fsencode(prompt).decode("utf-8", "replace")), [])


def _require_web(prompt: str | None) -> None:
    """Refuses, before a model is loaded, what cannot be served."""
    if prompt is not None:
        raise FireflyError("--web and --prompt are both given; leave one of them out")
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise FireflyError(f'{package} is not installed; run pip install "firefly-lightning[web]"')


def _load(path: str, device: str, dtype: str) -> tuple[BloomForCausalLM, PromptEncoder]:
    place = _device(device)
    default = "bfloat16" if place.type == "cuda" else "float32"
    bloom, tokenizer = load_bloom(path, getattr(torch, default if dtype == "auto" else dtype)), load_tokenizer(path)
    check_sizes(bloom.config, tokenizer, path)
    prompt = load_prompt_format(path)
    if prompt is None:
        print(f"note: {path} has no prompt_format.json; the format 'firefly' is used", file=sys.stderr)
    return bloom.to(place).eval(), PromptEncoder(tokenizer, prompt or PRESETS["firefly"])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise FireflyError(f"device {name}: not on this machine ({reason(error)}); try cpu") from error


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
    """Prints an answer while it comes, and collects it."""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
            pieces.append(piece)
    finally:
        print(flush=True)


def _take_any_character(stream: Any) -> None:
    """A terminal's encoding may lack a character, or all Chinese ones: then it is most likely set wrongly."""
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        "你好".encode(stream.encoding)
        stream.reconfigure(errors="replace")
    except UnicodeEncodeError:
        stream.reconfigure(encoding="utf-8", errors="replace")
