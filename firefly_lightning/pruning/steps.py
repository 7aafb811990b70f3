"""The steps of pruning a Bloom: reading the large one, its new tokenizer, rows and configuration, and the report."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError, MissingFileError
from firefly_lightning.files.model_json import read_config, read_generation_config, refuse_adapter
from firefly_lightning.prompt import SPECIAL_TOKENS
from firefly_lightning.pruning.tensor_files import EMBEDDING, HEAD, Checkpoint, count_parameters, open_checkpoint
from firefly_lightning.pruning.vocabulary import (
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
    """A large Bloom: its folder, configurations, tokenizer, ids by token, and the places of its tensors in files."""

    folder: Path
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, int]
    tensors: Checkpoint
    generation: dict[str, Any] | None


def open_large(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The configuration of a large Bloom, and the places of its tensors in files.

    Raises:
        FireflyError: If the folder holds no Bloom, or its configuration and weights do not belong together.
    """
    refuse_adapter(folder, str(folder))
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder}: has no config.json; give the folder of a Hugging Face model")
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
    """Adds the tokenizer and the settings of generation to what :func:`open_large` gives.

    Raises:
        FireflyError: If the tokenizer or the settings of generation cannot be used, or a token has no row in the
            embedding.
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
    return Large(folder, config, tokenizer, ids, tensors, generation)


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


def write_json(content: dict[str, Any], file: Path) -> None:
    """Writes a JSON object into a file, indented, with Chinese text as it is."""
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
