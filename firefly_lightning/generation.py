"""Answers of a model: one streamed character by character, many in a batch, and the chat of the command line."""

import contextlib
import copy
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import BloomForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from firefly_lightning.data.prompt import PRESETS, PromptEncoder, Turn
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import (
    PUBLISHED_DECODING,
    check_sizes,
    load_bloom,
    load_prompt_format,
    load_tokenizer,
    reason,
)


def chat(
    model: str,
    prompt: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    seed: int | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Talks with a model.

    Args:
        model: Folder or hub name.
        prompt: Answers this once, on stdout; without it, a conversation of several turns.
        device: Such as cpu or cuda:0; auto takes a GPU if there is one.
        dtype: Type of the weights; auto is bfloat16 on a GPU and float32 elsewhere.
        seed: Makes the answers repeatable.
        max_new_tokens: Longest answer; the model's own setting by default.

    Raises:
        FireflyError: If the model cannot be loaded, or the device is not there.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _take_any_character(stream)
    bloom, encoder = _load(model, device, dtype)
    config = default_decoding(bloom)
    config.max_new_tokens = max_new_tokens or config.max_new_tokens

    def answer(turns: Sequence[Turn], question: str) -> Iterator[str]:
        return generate_stream(bloom, encoder, turns, question, config, seed)

    if prompt is None:
        _converse(answer)
    else:
        # What the locale could not decode from the command line is UTF-8 after all.
        _show(answer([], os.fsencode(prompt).decode("utf-8", "replace")), [])


def generate_stream(
    model: BloomForCausalLM,
    encoder: PromptEncoder,
    turns: Sequence[Turn],
    question: str,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Streams an answer in pieces of whole characters, up to ``</s>``. Generation ends when nobody reads on.

    Args:
        model: Generates, on its device.
        encoder: Of the format the model was trained with.
        turns: What was said before.
        question: What to answer.
        generation_config: ``default_decoding`` of the model by default.
        seed: Makes the answer repeatable, and leaves PyTorch's random state as it was.
    """
    prompt_ids = torch.tensor([encoder.encode_question(turns, question)], device=model.device)
    streamer, stopped = _IdStreamer(), Event()

    def run() -> None:
        try:
            with _seeded(seed, model.device):
                model.generate(
                    prompt_ids,
                    attention_mask=torch.ones_like(prompt_ids),
                    generation_config=_decoding(generation_config, model, encoder),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_StopWhen(stopped)]),
                )
            streamer.results.put(None)
        except BaseException as error:  # raised again where the answer is read
            streamer.results.put(error)

    thread = Thread(target=run, name="generate", daemon=True)
    thread.start()
    try:
        yield from _decode_stream(encoder, streamer.ids())
    finally:
        stopped.set()
        thread.join()


def generate_batch(
    model: BloomForCausalLM,
    encoder: PromptEncoder,
    questions: Sequence[str],
    generation_config: GenerationConfig | None = None,
) -> list[str]:
    """Answers of first questions, all generated together; greedy ones are those each would get alone.

    Args:
        model: Generates, on its device.
        encoder: Of the format the model was trained with.
        questions: At once in memory, padded to the longest.
        generation_config: ``default_decoding`` of the model by default.
    """
    if not questions:
        return []
    prompts = [encoder.encode_question([], question) for question in questions]
    width = max(map(len, prompts))
    # On the left: an answer goes on from the last column, and ALiBi measures from the first column attended to.
    padding = [width - len(ids) for ids in prompts]
    input_ids = [[encoder.pad_token_id] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    attention_mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    output = model.generate(
        torch.tensor(input_ids, device=model.device),
        attention_mask=torch.tensor(attention_mask, device=model.device),
        generation_config=_decoding(generation_config, model, encoder),
    )
    return [_decode(encoder, ids) for ids in output[:, width:].tolist()]


def default_decoding(model: BloomForCausalLM) -> GenerationConfig:
    """The model's own generation config, or the published one where it does not say how long an answer may be."""
    config = model.generation_config
    return copy.deepcopy(config) if config.max_new_tokens else GenerationConfig(**PUBLISHED_DECODING)


def _decoding(config: GenerationConfig | None, model: BloomForCausalLM, encoder: PromptEncoder) -> GenerationConfig:
    config = default_decoding(model) if config is None else copy.deepcopy(config)
    config.eos_token_id, config.pad_token_id = encoder.eos_token_id, encoder.pad_token_id
    return config


def _decode(encoder: PromptEncoder, ids: list[int]) -> str:
    length = ids.index(encoder.eos_token_id) if encoder.eos_token_id in ids else len(ids)
    return str(encoder.backend.decode(ids[:length], skip_special_tokens=True))


def _decode_stream(encoder: PromptEncoder, ids: Iterable[int]) -> Iterator[str]:
    stream, seen, length = DecodeStream(skip_special_tokens=True), [], 0
    for token in ids:
        seen.append(token)
        # None inside a character: its bytes may be spread over several tokens.
        if piece := stream.step(encoder.backend, token):
            length += len(piece)
            yield piece
    if rest := _decode(encoder, seen)[length:]:
        yield rest


class _IdStreamer(BaseStreamer):  # type: ignore[misc]  # untyped base
    """Hands ids from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self.results: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self.results.put(value.flatten().tolist())
        self._prompt_is_next = False

    def end(self) -> None:
        """Nothing: the thread itself says when it is done, also when it failed."""

    def ids(self) -> Iterator[int]:
        while (result := self.results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield from result


class _StopWhen(StoppingCriteria):  # type: ignore[misc]  # untyped base
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
