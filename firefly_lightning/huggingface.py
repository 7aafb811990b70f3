"""Reading Hugging Face folders of Bloom, and the description from which a checkpoint becomes such a folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from firefly_lightning.errors import FireflyError, reason, some
from firefly_lightning.files.hub import find_model_file
from firefly_lightning.files.json_object import read_json_object
from firefly_lightning.files.model_json import (
    CURE,
    FLOATS,
    check_index,
    layers_beyond,
    read_config,
    read_generation_config,
    refuse_adapter,
)
from firefly_lightning.prompt import SPECIAL_TOKENS, PromptFormat

PUBLISHED_DECODING = {
    "max_new_tokens": 200,
    "do_sample": True,
    "top_p": 0.85,
    "temperature": 0.35,
    "repetition_penalty": 1.2,
}
"""Decoding settings with which the published Firefly models answer."""

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


def load_config(path: str) -> BloomConfig:
    """The configuration of a Bloom.

    Args:
        path: Folder or hub name of the model.

    Raises:
        FireflyError: If there is no configuration, or the model is of another architecture.
    """
    file = find_model_file(path, "config.json")
    if file is None or Path(path).is_dir():
        _refuse_adapter(path)
    if file is None:
        what = "has no config.json; give a folder that holds a Bloom model"
        if any(Path(path).glob("*.ckpt")):
            what = f"holds a checkpoint; make a model of it: firefly export --checkpoint {path} --out FOLDER"
        raise FireflyError(f"{path}: {what}")
    fields = read_config(file)
    try:
        return BloomConfig.from_dict(fields)
    except Exception as error:  # transformers 5 checks the types of further fields
        raise FireflyError(f"{file}: is no configuration of a Bloom ({reason(error)}); {CURE}") from error


def check_model(path: str, from_scratch: bool = False) -> BloomConfig:
    """The configuration of a Bloom whose files are all there, without reading its weights.

    Args:
        path: Folder or hub name of the model.
        from_scratch: Whether weights are not needed.

    Raises:
        FireflyError: If the model is no Bloom, its weights are not there, or its settings of generation are unusable.
    """
    config = load_config(path)
    if file := find_model_file(path, "generation_config.json"):
        read_generation_config(file)
    if Path(path).is_dir() and not from_scratch:
        check_index(Path(path))
    return config


def load_bloom(path: str, dtype: torch.dtype) -> BloomForCausalLM:
    """A Bloom with all its weights.

    Args:
        path: Folder or hub name of the model.
        dtype: Type that the weights are converted to.

    Raises:
        FireflyError: If the model is no Bloom, its weights are missing, damaged, incomplete or of other sizes, or its
            settings of generation cannot be used.
    """
    config = check_model(path)
    # transformers 4.51 knows only the old name of the argument, 5 means to drop it.
    dtype_name = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    try:
        with _quiet_transformers():
            model, info = BloomForCausalLM.from_pretrained(
                path, config=config, output_loading_info=True, **{dtype_name: dtype}
            )
    except Exception as error:  # whatever the readers of the several weight formats raise
        raise FireflyError(f"{path}: the weights cannot be read ({reason(error)}); fetch them again") from error
    # transformers would go on with random numbers in the place of missing weights, and without layers too many.
    if missing := sorted(info["missing_keys"]):
        raise FireflyError(f"{path}: the weights lack {some(missing)}; fetch them again")
    if layers := layers_beyond(config.n_layer, info["unexpected_keys"]):
        raise FireflyError(f"{path}: the weights have {some(layers)}, which config.json lacks; fetch both again")
    for name in FLOATS:  # transformers refuses a temperature of 2, and takes 2.0
        if isinstance(value := getattr(model.generation_config, name, None), int):
            setattr(model.generation_config, name, float(value))
    return model


def random_bloom(config: BloomConfig, dtype: torch.dtype) -> BloomForCausalLM:
    """A Bloom with weights drawn as Hugging Face draws them, from PyTorch's random state."""
    return BloomForCausalLM(config).to(dtype)


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, read from its ``tokenizer.json``.

    Args:
        path: Folder or hub name of the model.

    Raises:
        FireflyError: If there is no tokenizer, or it cannot be read.
    """
    if find_model_file(path, "tokenizer.json") is None:
        _refuse_adapter(path)
        raise FireflyError(f"{path}: has no tokenizer.json; copy the tokenizer's files there")
    try:
        # Bloom's tokenizer_config.json names a class of its own, which transformers 5 no longer has: a warning at most.
        with _quiet_transformers():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # tokenizers raises plain Exception
        raise FireflyError(f"{path}: the tokenizer cannot be read ({reason(error)}); fetch it again") from error
    if empty := [name for name in SPECIAL_TOKENS if getattr(tokenizer, name, None) == ""]:
        raise FireflyError(f"{path}: tokenizer_config.json has an empty {empty[0]}; {CURE}")
    return tokenizer


def load_prompt_format(path: str) -> PromptFormat | None:
    """The prompt format that a model was trained with; None where its folder does not say.

    Args:
        path: Folder or hub name of the model.

    Raises:
        FireflyError: If ``prompt_format.json`` is malformed.
    """
    file = find_model_file(path, "prompt_format.json")
    if file is None:
        return None
    fields = read_json_object(file, CURE)
    known = asdict(PromptFormat()).keys()
    if fields.keys() - known or not all(isinstance(value, str) for value in fields.values()):
        raise FireflyError(f"{file}: must map {', '.join(known)} to strings, and nothing else")
    try:
        return PromptFormat(**fields)
    except FireflyError as error:
        raise FireflyError(f"{file}: {error}") from error


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
    """Writes the files of a description into an existing folder."""
    for name in DESCRIPTION_FILES:
        content = description[name]
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")


def _describe_config(model_config: BloomConfig) -> dict[str, Any]:
    stored = json.loads(model_config.to_json_string())
    # Fields that begin with _ concern this process alone, such as the folder that the model came from.
    fields = {name: value for name, value in stored.items() if not name.startswith("_")}
    # transformers 5 reads both names of the type, 4 only the old one.
    dtype = fields.pop("dtype", None) or fields.pop("torch_dtype", None)
    tied = bool(model_config.tie_word_embeddings)
    return fields | {"torch_dtype": dtype, "architectures": ["BloomForCausalLM"], "tie_word_embeddings": tied}


def _tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> str:
    # Truncation and padding are left over from the last call, no part of the tokenizer. The JSON stays text in a
    # checkpoint, because weights_only reads a text at once and a vocabulary token by token.
    fields = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(fields, ensure_ascii=False)


def _refuse_adapter(path: str) -> None:
    if file := find_model_file(path, "adapter_config.json"):
        refuse_adapter(file.parent, path)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
