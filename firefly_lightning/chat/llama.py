"""A GGUF that answers, in llama.cpp, as :class:`firefly_lightning.chat.answering.Answering` does in PyTorch."""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any
from urllib.request import Request, urlopen

from transformers import GenerationConfig

from firefly_lightning.errors import FireflyError, reason, require
from firefly_lightning.evaluation.streaming import from_thread
from firefly_lightning.huggingface import PUBLISHED_DECODING
from firefly_lightning.prompt import Turn

_SAMPLERS = ("penalties", "temperature", "top_k", "top_p")
"""Order of the steps in which transformers chooses a token; llama.cpp's own order gives other probabilities."""

_FIELDS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
"""Settings of generation, by their names in transformers, in llama.cpp's words."""


class LlamaAnswering:
    """A loaded GGUF; calling this object streams the answer to a question after some turns.

    Args:
        path: The file.
        seed: Makes the answers repeatable.
        max_new_tokens: Most tokens of an answer; 200 by default.

    Attributes:
        config: Settings of generation that are used where a call gives none: those in the file.

    Raises:
        FireflyError: If the file is not there, llama.cpp cannot load it, or its binding is not installed.
    """

    def __init__(self, path: str, seed: int | None, max_new_tokens: int | None) -> None:
        require("gguf", "xllamacpp")
        file = Path(path).expanduser()
        if not file.is_file():
            raise FireflyError(f"--gguf {path}: no such file; make one with firefly export --gguf {path}")
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise FireflyError(f"--gguf {path}: is no GGUF; make one with firefly export --gguf")
        self._seed = seed
        self._server, self._key = _load(str(file))
        self.config = self._own_settings(max_new_tokens)

    def __call__(self, turns: Sequence[Turn], question: str, config: GenerationConfig | None = None) -> Iterator[str]:
        """Streams the pieces of the answer as they are generated; generation ends when nobody reads on."""
        said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": text} for role, text in [*said, ("user", question)]]

        def generate(put: Callable[[dict[str, Any]], None], stopped: Event) -> None:
            def take(event: dict[str, Any]) -> bool:
                put(event)
                return stopped.is_set()

            try:
                self._server.handle_chat_completions({"messages": messages, **self._settings(config)}, take)
            except (ValueError, RuntimeError) as error:
                raise FireflyError(f"llama.cpp: {reason(error)}") from error

        with contextlib.closing(from_thread(generate)) as events:
            for event in events:
                if "error" in event:
                    raise FireflyError(f"llama.cpp: {event['error']['message']}")
                if piece := event["choices"][0]["delta"].get("content"):
                    yield piece

    def _settings(self, config: GenerationConfig | None) -> dict[str, Any]:
        config = config or self.config
        given = {own: value for name, own in _FIELDS.items() if (value := getattr(config, name)) is not None}
        return {
            **given,
            **({} if config.do_sample else {"temperature": 0}),
            "max_tokens": config.max_new_tokens,
            "min_p": 0,
            "repeat_last_n": self._context,
            "samplers": _SAMPLERS,
            "stream": True,
            **({} if self._seed is None else {"seed": self._seed % 2**32}),
        }

    def _own_settings(self, max_new_tokens: int | None) -> GenerationConfig:
        """The settings in the file, which llama.cpp tells by its server alone."""
        key = {"Authorization": f"Bearer {self._key}"}
        with urlopen(Request(f"{self._server.listening_address}/props", headers=key)) as response:
            told = json.load(response)["default_generation_settings"]
        self._context = told["n_ctx"]
        own = {name: round(told["params"][field], 6) for name, field in _FIELDS.items()}  # they are float32 there
        drawn = own["temperature"] > 0
        return GenerationConfig(
            max_new_tokens=max_new_tokens or PUBLISHED_DECODING["max_new_tokens"],
            do_sample=drawn,
            **(own if drawn else {"repetition_penalty": own["repetition_penalty"]}),
        )


def _load(file: str) -> tuple[Any, str]:
    """llama.cpp with a file, and the key of its server, which is on the loopback and answers nobody else."""
    import xllamacpp

    key = secrets.token_hex()
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = file, 0, 1
    settings.api_keys, settings.ui, settings.endpoint_slots, settings.verbosity = [key], False, False, -1
    try:
        return xllamacpp.Server(settings), key
    except RuntimeError as error:
        raise FireflyError(f"--gguf {file}: llama.cpp cannot load it ({reason(error)}); make it anew") from error
