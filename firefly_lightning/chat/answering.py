"""A model that answers: it is loaded once, and each answer is streamed piece by piece."""

import sys
from collections.abc import Iterator, Sequence

import torch
from transformers import BloomForCausalLM, GenerationConfig

from firefly_lightning.data.prompt_choice import USUAL, own_format
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.evaluation.generation import default_decoding, generate_stream
from firefly_lightning.huggingface import check_sizes, load_bloom, load_tokenizer
from firefly_lightning.model.fast_bloom import FastBloom, takes_fast_pass
from firefly_lightning.prompt import PromptEncoder, Turn


class Answering:
    """A loaded model; calling this object streams the answer to a question after some turns.

    Args:
        path: Folder or hub name of the model.
        device: Device of the model, such as cpu or cuda:0; auto takes a GPU if there is one.
        dtype: Type of the weights; auto is bfloat16 on a GPU and float32 elsewhere.
        seed: Makes the answers repeatable.
        max_new_tokens: Most tokens of an answer; the model's own setting by default.

    Attributes:
        config: Settings of generation that are used where a call gives none.

    Raises:
        FireflyError: If the model cannot be loaded, or the device is not there.
    """

    def __init__(self, path: str, device: str, dtype: str, seed: int | None, max_new_tokens: int | None) -> None:
        self._model, self._encoder = _load(path, device, dtype)
        self._bloom = FastBloom(self._model) if takes_fast_pass("auto", self._model.config) else None
        self._seed = seed
        self.config = default_decoding(self._model)
        if (self.config.num_beams or 1) > 1:
            raise FireflyError(
                f"{path}: generation_config.json has num_beams {self.config.num_beams}, with which no answer can be "
                "shown as it comes; set it to 1"
            )
        self.config.max_new_tokens = max_new_tokens or self.config.max_new_tokens

    def __call__(self, turns: Sequence[Turn], question: str, config: GenerationConfig | None = None) -> Iterator[str]:
        """Streams the pieces of the answer as they are generated."""
        settings = config or self.config
        return generate_stream(self._model, self._encoder, turns, question, settings, self._seed, self._bloom)


def _load(path: str, device: str, dtype: str) -> tuple[BloomForCausalLM, PromptEncoder]:
    place = _device(device)
    default = "bfloat16" if place.type == "cuda" else "float32"
    tokenizer = load_tokenizer(path)
    prompt = own_format(path, tokenizer)
    # Last, since a model of the hub whose weights are here is taken for whole where the hub is not reached.
    bloom = load_bloom(path, getattr(torch, default if dtype == "auto" else dtype))
    check_sizes(bloom.config, tokenizer, path)
    if prompt is None:
        lacks = "no prompt_format.json and no chat template that says its prompt format"
        print(f"note: {path} has {lacks}; {USUAL} is used", file=sys.stderr)
    return bloom.to(place).eval(), PromptEncoder(tokenizer, prompt or USUAL)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise FireflyError(f"device {name}: not on this machine ({reason(error)}); try cpu") from error
