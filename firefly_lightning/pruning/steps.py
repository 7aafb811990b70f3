"""The steps of pruning a Bloom: reading the large one, its new tokenizer, rows and configuration, and the report."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from firefly_lightning.data.prompt_choice import own_format
from firefly_lightning.errors import FireflyError, MissingFileError
from firefly_lightning.files.json_object import read_json_object, write_json
from firefly_lightning.files.model_json import CURE, read_config, read_generation_config, refuse_adapter
from firefly_lightning.prompt import SPECIAL_TOKENS, PromptFormat, format_of_template
from firefly_lightning.pruning.tensor_files import EMBEDDING, HEAD, Checkpoint, count_parameters, open_checkpoint
from firefly_lightning.pruning.vocabulary import (
    TEMPLATE_FILES,
    check_ready_made,
    copy_tokenizer,
    count_tokens,
    encode_stream,
    load_bpe_tokenizer,
    read_texts,
    select_tokens,
    token_ids,
    write_pruned_tokenizer,
)


class Large(NamedTuple):
    """A large Bloom: folder, configurations, tokenizer, ids by token, places of tensors in files, own prompt format."""

    folder: Path
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, int]
    tensors: Checkpoint
    generation: dict[str, Any] | None
    prompt: PromptFormat | None


def open_large(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The configuration of a large Bloom, and the places of its tensors in files.

    Raises:
        FireflyError: If the folder holds no Bloom, or its configuration and weights do not belong together.
    """
    refuse_adapter(folder, str(folder))
    if not (folder / "config.json").is_file():
        problem = "has no config.json; give the folder of a Hugging Face model" if folder.is_dir() else "no such folder"
        raise MissingFileError(f"{folder}: {problem}")
    config = read_config(folder / "config.json")
    tensors = open_checkpoint(folder, tied=config.get("tie_word_embeddings", True))
    vocabulary = tensors[EMBEDDING].shape[0]
    if config.get("vocab_size", vocabulary) != vocabulary:
        raise FireflyError(
            f"{folder}: config.json says vocab_size is {config['vocab_size']:,}, the weights have {vocabulary:,} rows; "
            "download both again"
        )
    return config, tensors


def load_large(folder: Path, config: dict[str, Any], tensors: Checkpoint) -> Large:
    """Adds tokenizer, settings of generation and prompt format to what :func:`open_large` gives.

    Raises:
        FireflyError: If one of them cannot be used, or a token has no row in the embedding.
    """
    tokenizer = load_bpe_tokenizer(folder)
    ids = token_ids(tokenizer)
    vocabulary, tokens = tensors[EMBEDDING].shape[0], max(ids.values()) + 1
    if tokens > vocabulary:
        raise FireflyError(
            f"{folder}: the tokenizer has {tokens:,} tokens, the model's vocabulary only {vocabulary:,}; "
            "use the tokenizer that belongs to the model"
        )
    file = folder / "generation_config.json"
    generation = read_generation_config(file) if file.is_file() else None
    return Large(folder, config, tokenizer, ids, tensors, generation, own_format(str(folder), tokenizer))


def plan_tokenizer(
    large: Large, corpus: list[str] | None, tokenizer: str | None, min_count: int, keep: str | None
) -> Callable[[Path], None]:
    """Chooses the tokens of the new tokenizer, and so finds every mistake of the user before anything is written.

    Returns:
        A function that writes the new tokenizer into a folder.
    """
    if tokenizer:
        small = load_bpe_tokenizer(Path(tokenizer))
        check_ready_made(small, large.ids, large.folder)
        return partial(copy_tokenizer, small)
    used = set((count_tokens(large.tokenizer, corpus or []) >= min_count).nonzero()[0].tolist())
    if keep:
        used.update(
            number for _, texts in encode_stream(large.tokenizer, read_texts(keep)) for ids in texts for number in ids
        )
    return partial(write_pruned_tokenizer, large.tokenizer, select_tokens(large.tokenizer, used))


def vocabulary_rows(large_ids: dict[str, int], small_ids: dict[str, int], pad_multiple: int) -> Tensor:
    """Row of the large vocabulary for each row of the new one; ``(vocabulary,)``.

    Rows without a token copy the row of padding, so that they are as unlikely as padding.
    """
    tokens = max(small_ids.values()) + 1
    rows = torch.full((tokens + -tokens % pad_multiple,), large_ids[SPECIAL_TOKENS["pad_token"]])
    for token, number in small_ids.items():
        rows[number] = large_ids[token]
    return rows


def write_configs(large: Large, small: PreTrainedTokenizerFast, vocabulary: int, out: Path) -> None:
    """Writes config.json and, where the large model has one, generation_config.json with the new ids and sizes."""
    special = {f"{name}_id": getattr(small, f"{name}_id") for name in SPECIAL_TOKENS}
    # A head that only repeats the embedding was dropped, whatever the configuration said of it.
    new = {
        "vocab_size": vocabulary,
        "architectures": ["BloomForCausalLM"],
        "tie_word_embeddings": HEAD not in large.tensors,
    }
    write_json({**large.config, **special, **new}, out / "config.json")
    if large.generation is not None:
        known = {name: number for name, number in special.items() if large.generation.get(name) is not None}
        write_json({**large.generation, **known}, out / "generation_config.json")


def keep_prompt_format(large: Large, small: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the prompt format that the large model was trained with, if that is known.

    A ready-made tokenizer with the chat template of another format gets the model's: the weights know no other.
    """
    if large.prompt is None:
        return
    write_json(asdict(large.prompt), out / "prompt_format.json")
    if small.chat_template != large.tokenizer.chat_template and format_of_template(small) != large.prompt:
        config = read_json_object(out / "tokenizer_config.json", CURE)
        write_json(config | {"chat_template": large.prompt.chat_template()}, out / "tokenizer_config.json")
        for name in TEMPLATE_FILES:
            (out / name).unlink(missing_ok=True)


def report(large: Large, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Numbers of tokens, rows of the vocabulary and parameters, before and after pruning, and their ratio."""
    before = large.tensors[EMBEDDING].shape[0]
    return {
        "tokens": _change(len(large.ids), tokens),
        "vocabulary": _change(before, vocabulary),
        "parameters": _change(count_parameters(large.tensors, before), count_parameters(large.tensors, vocabulary)),
    }


def _change(before: int, after: int) -> dict[str, float]:
    return {"before": before, "after": after, "ratio": after / before}
