"""The description of a model: all of its Hugging Face folder but the weights, which a checkpoint carries along."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import BloomConfig, PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError
from firefly_lightning.prompt import SPECIAL_TOKENS, PromptFormat

PUBLISHED_DECODING = {
    "max_new_tokens": 200,
    "do_sample": True,
    "top_p": 0.85,
    "temperature": 0.35,
    "repetition_penalty": 1.2,
}
"""Decoding settings with which the published Firefly models answer."""

LICENSE = "bigscience-bloom-rail-1.0"
"""The licence of Bloom's weights, as a hub calls it, which what is made of them carries on."""

DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "prompt_format.json",
)
"""Files of a Hugging Face folder besides the weights; the same names are the keys of a description."""

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 has no BloomTokenizerFast; this one reads its file
    # Without it, transformers 4 makes token_type_ids too, which Bloom refuses.
    "model_input_names": ["input_ids", "attention_mask"],
    **SPECIAL_TOKENS,
}
"""What tokenizer_config.json must say for the tokenizer to load and serve a Bloom in transformers 4 and 5."""

UNUSED_ROWS = 1024
"""Number of embedding rows without a token that is too large for padding: Bloom has 200, parallelism adds a few."""


def check_sizes(model_config: BloomConfig, tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Checks that a tokenizer and an embedding belong together.

    Args:
        model_config: Configuration of the model, which gives the number of the embedding's rows.
        tokenizer: The tokenizer, which gives the number of tokens.
        where: Name of the model, which opens the error message.

    Raises:
        FireflyError: If a token has no row, or 1,024 rows or more have no token.
    """
    rows, tokens = model_config.vocab_size, max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > rows:
        raise FireflyError(
            f"{where}: the tokenizer has {tokens} tokens, the embedding only {rows} rows; they do not match"
        )
    if rows - tokens >= UNUSED_ROWS:
        raise FireflyError(
            f"{where}: {rows - tokens} of the embedding's {rows} rows have no token; is this the model's own tokenizer?"
        )


def check_same_model(description: dict[str, Any], model_config: BloomConfig, where: str) -> None:
    """Checks that the model of a checkpoint has the sizes of the model that it is to be loaded into.

    Args:
        description: What ``describe`` gave for the model of the checkpoint; where empty, nothing is checked.
        model_config: Configuration of the model that the checkpoint is to be loaded into.
        where: Name of this model, which opens the error message.

    Raises:
        FireflyError: If a size differs.
    """
    saved = description.get("config.json", {})
    for name in ("vocab_size", "hidden_size", "n_layer", "n_head"):
        size = getattr(model_config, name)
        if saved.get(name, size) != size:
            raise FireflyError(f"{where}: has {name} {size}, but the checkpoint is of a model with {saved[name]}")


def describe(model_config: BloomConfig, tokenizer: PreTrainedTokenizerFast, prompt: PromptFormat) -> dict[str, Any]:
    """Everything of a Hugging Face folder but the weights; a checkpoint that carries it can become such a folder.

    Returns:
        Contents by file name: JSON objects, and the text of ``tokenizer.json``. They are made of plain Python types
        only, which ``torch.load(weights_only=True)`` takes.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {
        "config.json": _describe_config(model_config) | ids,
        "generation_config.json": PUBLISHED_DECODING | ids,
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            **TOKENIZER_CONFIG,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            # The template is here and not in chat_template.jinja, which transformers 4 reads in the locale's encoding.
            "chat_template": prompt.chat_template(),
        },
        "prompt_format.json": asdict(prompt),
    }


def write_description(description: dict[str, Any], out: Path) -> None:
    """Writes the files of a description, or of a part of it, into an existing folder."""
    for name, content in description.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")


def _describe_config(model_config: BloomConfig) -> dict[str, Any]:
    stored = json.loads(model_config.to_json_string())
    # Fields that begin with _ concern this process alone, such as the folder that the model came from.
    fields = {name: value for name, value in stored.items() if not name.startswith("_")}
    fields.pop("quantization_config", None)  # how a run keeps the weights in memory
    # transformers 5 reads both names of the type, 4 only the old one.
    dtype = fields.pop("dtype", None) or fields.pop("torch_dtype", None)
    tied = bool(model_config.tie_word_embeddings)
    return fields | {"torch_dtype": dtype, "architectures": ["BloomForCausalLM"], "tie_word_embeddings": tied}


def _tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> str:
    # Truncation and padding are left over from the last call, no part of the tokenizer. The JSON stays text in a
    # checkpoint, because weights_only reads a text at once and a vocabulary token by token.
    fields = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(fields, ensure_ascii=False)
