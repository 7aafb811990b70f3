"""Vocabulary pruning: a multilingual Bloom with the tokens of one corpus only, and the same answers."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.files.atomic import check_new_folder, new_folder
from firefly_lightning.prompt import SPECIAL_TOKENS
from firefly_lightning.pruning.tensor_files import EMBEDDING, HEAD, Checkpoint, count_parameters, open_checkpoint
from firefly_lightning.pruning.verify import Verification, verify_pruning
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
from firefly_lightning.pruning.weights_writer import CheckpointWriter


def prune(
    model: str,
    out: str,
    corpus: list[str] | None = None,
    tokenizer: str | None = None,
    min_count: int = 1,
    pad_multiple: int = 1,
    keep: str | None = None,
    verify: str | None = None,
    link: bool = False,
) -> None:
    """Prunes the vocabulary of a Bloom: embedding rows of tokens that are not kept go, nothing else changes.

    Kept are the tokens that occur in a corpus, all tokens that they are merged from, single bytes and special tokens;
    or the tokens of a ready-made smaller tokenizer. Text of kept tokens is tokenised as before and gets the same
    logits. The weights are streamed, so a model larger than the memory can be pruned. The folder loads with
    transformers alone, and pruning.json in it says what was saved.

    Args:
        model: Hugging Face folder with a Bloom: config.json, tokenizer.json, and weights in either format.
        out: Folder to make; it must not exist, or be empty.
        corpus: Instruction rows (.jsonl, .json, .parquet, globs, hub names) or .txt files with a text a line, whose
            tokens are kept. Give either this or --tokenizer.
        tokenizer: Folder with a smaller tokenizer, every token of which is in the large one; its order is kept.
        min_count: How often a token must occur in the corpus to be kept.
        pad_multiple: Pads the vocabulary to a multiple of this with copies of the <pad> row.
        keep: A file like those, whose tokens are kept whatever their count.
        verify: A file like those, on which to prove that token strings and logits are unchanged. Loads the large and
            the pruned model in float32, one after the other, which needs memory for each.
        link: Gives files of weights in which nothing changes a second name in the new folder (hard links) instead of
            copying them, which takes no time and no disk. What is later written into such a file changes both models.
            A file system that shares blocks (XFS, Btrfs) does without copying anyway, and without that danger.

    Raises:
        FireflyError: If something given is wrong, verification fails, or the disk is full. Then nothing is left behind.
    """
    started = time.perf_counter()
    _check_arguments(corpus, tokenizer, min_count, pad_multiple, keep)
    inputs = [model, *(corpus or []), *filter(None, (tokenizer, keep, verify))]
    check_new_folder(Path(out), inputs)
    # Before the minutes that a large model takes.
    if verify and next(read_texts(verify), None) is None:
        raise FireflyError(f"{verify}: has no text to verify with; give a file with a text a line")
    config, tensors = _open_large(Path(model))
    with new_folder(Path(out), inputs) as folder, CheckpointWriter(tensors, folder, link) as weights:
        large = _load_large(Path(model), config, tensors)
        _plan_tokenizer(large, corpus, tokenizer, min_count, keep)(folder)
        small = load_bpe_tokenizer(folder)
        small_ids = token_ids(small)
        rows = _vocabulary_rows(large.ids, small_ids, pad_multiple)
        weights.finish(rows)
        _write_configs(large, small, len(rows), folder)
        verification = verify_pruning(large.tokenizer, folder, rows, verify) if verify else None
        report = _report(large, len(small_ids), len(rows))
        if weights.linked:
            report["linked"] = {name: str(file) for name, file in weights.linked.items()}
        if verification:
            report["verified"] = verification._asdict()
        report["seconds"] = round(time.perf_counter() - started, 2)
        _write_json(report, folder / "pruning.json")
    _print_report(report, out)


class _Large(NamedTuple):
    folder: Path
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, int]
    tensors: Checkpoint


def _check_arguments(
    corpus: list[str] | None, tokenizer: str | None, min_count: int, pad_multiple: int, keep: str | None
) -> None:
    if bool(corpus) == bool(tokenizer):
        given = "both are" if corpus else "neither is"
        raise FireflyError(f"--corpus, --tokenizer: {given} given; give one of them")
    if tokenizer and (keep or min_count != 1):
        raise FireflyError("--keep, --min_count: belong to --corpus; a ready-made --tokenizer is taken as it is")
    for name, value in (("min_count", min_count), ("pad_multiple", pad_multiple)):
        if value < 1:
            raise FireflyError(f"--{name}: {value} is less than 1; give 1 or more")


def _open_large(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "bloom":
        raise FireflyError(f"{folder}: its model_type is {config.get('model_type')!r}, not 'bloom'; use a Bloom model")
    tensors = open_checkpoint(folder, tied=config.get("tie_word_embeddings", True))
    vocabulary = tensors[EMBEDDING].shape[0]
    if config.get("vocab_size", vocabulary) != vocabulary:
        raise FireflyError(
            f"{folder}: config.json says vocab_size is {config['vocab_size']:,}, the weights have {vocabulary:,} rows; "
            "download both again"
        )
    return config, tensors


def _load_large(folder: Path, config: dict[str, Any], tensors: Checkpoint) -> _Large:
    tokenizer = load_bpe_tokenizer(folder)
    ids = token_ids(tokenizer)
    vocabulary, tokens = tensors[EMBEDDING].shape[0], max(ids.values()) + 1
    if tokens > vocabulary:
        raise FireflyError(
            f"{folder}: the tokenizer has {tokens:,} tokens, the model's vocabulary only {vocabulary:,}; "
            "use the tokenizer that belongs to the model"
        )
    return _Large(folder, config, tokenizer, ids, tensors)


def _plan_tokenizer(
    large: _Large, corpus: list[str] | None, tokenizer: str | None, min_count: int, keep: str | None
) -> Callable[[Path], None]:
    """Does all that can fail on the user's side, and leaves the writing."""
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


def _vocabulary_rows(large_ids: dict[str, int], small_ids: dict[str, int], pad_multiple: int) -> Tensor:
    """Row of the large vocabulary for each row of the new; rows without a token are as unlikely as padding."""
    tokens = max(small_ids.values()) + 1
    rows = torch.full((tokens + -tokens % pad_multiple,), large_ids[SPECIAL_TOKENS["pad_token"]])
    for token, number in small_ids.items():
        rows[number] = large_ids[token]
    return rows


def _write_configs(large: _Large, small: PreTrainedTokenizerFast, vocabulary: int, out: Path) -> None:
    special = {f"{name}_id": getattr(small, f"{name}_id") for name in SPECIAL_TOKENS}
    # A head saved twice over was dropped, whatever the configuration said of it.
    new = {
        "vocab_size": vocabulary,
        "architectures": ["BloomForCausalLM"],
        "tie_word_embeddings": HEAD not in large.tensors,
    }
    _write_json({**large.config, **special, **new}, out / "config.json")
    if (large.folder / "generation_config.json").is_file():
        generation = _read_json(large.folder / "generation_config.json")
        known = {name: number for name, number in special.items() if generation.get(name) is not None}
        _write_json({**generation, **known}, out / "generation_config.json")


def _report(large: _Large, tokens: int, vocabulary: int) -> dict[str, Any]:
    before = large.tensors[EMBEDDING].shape[0]
    return {
        "tokens": _change(len(large.ids), tokens),
        "vocabulary": _change(before, vocabulary),
        "parameters": _change(count_parameters(large.tensors, before), count_parameters(large.tensors, vocabulary)),
    }


def _change(before: int, after: int) -> dict[str, float]:
    return {"before": before, "after": after, "ratio": after / before}


def _print_report(report: dict[str, Any], out: str) -> None:
    table = Table("", "before", "after", "kept", title=f"{escape(out)}, pruned in {report['seconds']:.1f} s")
    for name in ("tokens", "vocabulary", "parameters"):
        before, after, ratio = report[name].values()
        table.add_row(name, f"{before:,}", f"{after:,}", f"{ratio:.2%}")
    console = Console()
    console.print(table)
    if "linked" in report:
        linked = ", ".join(f"{name} is {file}" for name, file in report["linked"].items())
        console.print(escape(f"{linked}: what is written into one changes both models."), soft_wrap=True)
    if "verified" in report:
        console.print(Verification(**report["verified"]).summary(), soft_wrap=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FireflyError(f"{file.parent}: has no {file.name}; give the folder of a Hugging Face model") from error
    except OSError as error:
        raise FireflyError(describe_os_error(error, file)) from error
    except ValueError as error:
        raise FireflyError(f"{file}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise FireflyError(f"{file}: holds no JSON object; download it again")
    return content


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
