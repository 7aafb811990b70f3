"""Answers of a model: one streamed character by character, or many in a batch."""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from threading import Event
from typing import Any, TypedDict

import torch
import transformers
from tokenizers.decoders import DecodeStream
from transformers import BloomForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from firefly_lightning.errors import FireflyError, check_number, reason
from firefly_lightning.evaluation.rows_in_flight import Row, RowsInFlight
from firefly_lightning.evaluation.streaming import from_thread
from firefly_lightning.evaluation.token_choice import TokenChoice
from firefly_lightning.huggingface import PUBLISHED_DECODING
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.prompt import PromptEncoder, Turn

_AS_GIVEN: dict[str, Any] = {"use_model_defaults": False} if transformers.__version__.startswith("4.") else {}
"""Has transformers 4 take settings as they are given; else it would take the model's own for each that equals a default
of its own, such as ``do_sample: false``."""


def generate_stream(
    model: BloomForCausalLM,
    encoder: PromptEncoder,
    turns: Sequence[Turn],
    question: str,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    bloom: FastBloom | None = None,
) -> Iterator[str]:
    """Streams an answer in pieces of whole characters, up to ``</s>``. Generation ends when nobody reads on.

    Args:
        model: The model that answers, on its own device.
        encoder: Encodes questions in the format that the model was trained with.
        turns: The turns of the conversation so far.
        question: The question to answer.
        generation_config: Settings of generation; ``default_decoding`` of the model by default.
        seed: Makes the answer repeatable, and leaves PyTorch's random state as it was.
        bloom: The same model for :class:`RowsInFlight`, which is faster and takes most settings of generation.
    """
    prompt, config = encoder.encode_question(turns, question), _decoding(generation_config, model, encoder)
    choice = TokenChoice.of(config)
    if bloom is None or choice is None:
        ids = _stock_ids(model, prompt, config, seed)
    else:
        ids = _ids(RowsInFlight(bloom, choice, encoder.eos_token_id, places=1), Row(prompt, seed=seed))
    with contextlib.closing(ids):
        yield from _decode_stream(encoder, ids)


def _ids(in_flight: RowsInFlight, row: Row) -> Generator[int]:
    """The token ids of one answer, as they are generated."""
    in_flight.add([row])
    while not row.done:
        before = len(row.answer)
        in_flight.step()
        yield from row.answer[before:]


def _stock_ids(
    model: BloomForCausalLM, prompt: Sequence[int], config: GenerationConfig, seed: int | None
) -> Generator[int]:
    """The token ids of one answer, as Hugging Face generates them in a thread."""
    prompt_ids = torch.tensor([prompt], device=model.device)

    def generate(put: Callable[[list[int]], None], stopped: Event) -> None:
        with _seeded(seed, model.device):
            model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                generation_config=config,
                **_AS_GIVEN,
                streamer=_IdStreamer(put),
                stopping_criteria=StoppingCriteriaList([_StopWhen(stopped)]),
            )

    with contextlib.closing(from_thread(generate)) as found:
        for ids in found:
            yield from ids


def answer_prompts(
    model: BloomForCausalLM,
    encoder: PromptEncoder,
    prompts: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    in_step: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Answers to prompts, all generated together; a greedy answer is the one that its prompt would get alone.

    Args:
        model: The model that answers.
        encoder: Decodes answers; it has the format that the model was trained with.
        prompts: Token ids of each prompt, up to where its answer begins.
        generation_config: Settings of generation; ``default_decoding`` of the model by default.
        seed: Makes the answers repeatable, and leaves PyTorch's random state as it was.
        in_step: Whether all ranks call this together and run the model equally often, until the last rank is done; a
            rank without prompts runs the model on a token of padding.
        device: Where the model runs, which is not always where its weights lie; ``model.device`` by default.
    """
    if not prompts and not in_step:
        return []
    stopped = Event()
    if not prompts:
        stopped.set()  # this rank is done at once, but transformers runs the model while another rank needs it
    input_ids, attention_mask = _pad_left(prompts or [[encoder.pad_token_id]], encoder.pad_token_id)
    device = device or model.device
    with _seeded(seed, device):
        output = model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=_decoding(generation_config, model, encoder),
            **_AS_GIVEN,
            stopping_criteria=StoppingCriteriaList([_StopWhen(stopped)]),
            synced_gpus=in_step,
        )
    return [decode_answer(encoder, ids) for ids in output[: len(prompts), input_ids.shape[1] :].tolist()]


def default_decoding(model: BloomForCausalLM) -> GenerationConfig:
    """The model's own generation config, or the published one where that does not say how long an answer may be."""
    config = model.generation_config
    return copy.deepcopy(config) if config.max_new_tokens else GenerationConfig(**PUBLISHED_DECODING)


class Decoding(TypedDict, total=False):
    """Settings of generation, as in Hugging Face's ``GenerationConfig``; a setting left out is the model's own."""

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float


_RANGES: dict[str, tuple[float | None, float | None, float | None]] = {
    # least, most, above
    "max_new_tokens": (1, None, None),
    "min_new_tokens": (0, None, None),
    "temperature": (0.001, 100, None),
    "top_k": (0, None, None),
    "top_p": (None, 1, 0),
    "repetition_penalty": (None, None, 0),
    "no_repeat_ngram_size": (0, None, None),
    "num_beams": (1, None, None),
    "length_penalty": (None, None, None),
}
"""Settings that transformers refuses only where it generates, or not at all."""


def change_decoding(config: GenerationConfig, changes: Decoding) -> GenerationConfig:
    """A copy of a generation config with some settings changed.

    Raises:
        FireflyError: If a setting does not exist, or cannot have its new value.
    """
    for name, (least, most, above) in _RANGES.items():
        check_number(f"model.decoding.{name}", changes.get(name), least, most, above)  # type: ignore[arg-type]
    changed = copy.deepcopy(config)
    if changes.get("do_sample") is False:
        for name in ("temperature", "top_k", "top_p"):  # transformers 4.51 warns of sampling's settings where they stay
            setattr(changed, name, getattr(GenerationConfig(), name))
    try:
        unknown = changed.update(**changes)
    except (ValueError, TypeError) as error:
        raise FireflyError(f"model.decoding: {reason(error).rstrip('.')}; choose another value") from error
    if unknown:
        raise FireflyError(f"model.decoding: no setting is called {', '.join(unknown)}; see GenerationConfig")
    return changed


def _decoding(config: GenerationConfig | None, model: BloomForCausalLM, encoder: PromptEncoder) -> GenerationConfig:
    config = default_decoding(model) if config is None else copy.deepcopy(config)
    config.eos_token_id, config.pad_token_id = encoder.eos_token_id, encoder.pad_token_id
    return config


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompts, (prompts, longest), padded on the left.

    An answer goes on from the last column, and ALiBi measures distances from the first column that is attended to.
    """
    width = max(map(len, prompts))
    input_ids = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    attention_mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


def decode_answer(encoder: PromptEncoder, ids: list[int]) -> str:
    """The text of an answer, up to the token that ends it."""
    length = ids.index(encoder.eos_token_id) if encoder.eos_token_id in ids else len(ids)
    return str(encoder.backend.decode(ids[:length], skip_special_tokens=True))


def _decode_stream(encoder: PromptEncoder, ids: Iterable[int]) -> Iterator[str]:
    stream, seen, length = DecodeStream(skip_special_tokens=True), [], 0
    for token in ids:
        seen.append(token)
        # The piece is None inside a character, whose bytes may be spread over several tokens.
        if piece := stream.step(encoder.backend, token):
            length += len(piece)
            yield piece
    if rest := decode_answer(encoder, seen)[length:]:
        yield rest


class _IdStreamer(BaseStreamer):  # type: ignore[misc]  # untyped base
    """Hands on the token ids that are generated, without those of the prompt."""

    def __init__(self, hand_on: Callable[[list[int]], None]) -> None:
        self._hand_on = hand_on
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self._hand_on(value.flatten().tolist())
        self._prompt_is_next = False

    def end(self) -> None:
        """Does nothing: the thread itself says when it is done, also when it failed."""


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
