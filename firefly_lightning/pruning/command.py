"""``firefly prune``: its flags, their checks, and what it prints."""

import time
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError, check_number
from firefly_lightning.files.atomic import check_new_folder, new_folder


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
    """Prunes the vocabulary of a Bloom: embedding rows of tokens that are not kept go, and nothing else changes.

    The tokens kept are those that occur in a corpus, all tokens that these are merged from, single bytes and special
    tokens; or the tokens of a ready-made smaller tokenizer. Text of kept tokens is tokenised as before and gets the
    same logits. The weights are streamed, so a model larger than the memory can be pruned. The folder loads with
    transformers alone, and pruning.json in it says what was saved.

    Args:
        model: Hugging Face folder with a Bloom: config.json, tokenizer.json, and weights (.safetensors or .bin).
        out: Folder to make; if it exists, it must be empty.
        corpus: Instruction rows (.jsonl, .json, .csv, .tsv, .parquet, compressed too, globs, hub names) or .txt files
            with a text a line, whose tokens are kept. Give either this or --tokenizer.
        tokenizer: Folder with a smaller tokenizer, every token of which is in the large one; its order is kept.
        min_count: How often a token must occur in the corpus to be kept.
        pad_multiple: Pads the vocabulary to a multiple of this with copies of the <pad> row.
        keep: A file like those of --corpus, whose tokens are kept whatever their count.
        verify: A file like those of --corpus, on which to prove that token strings and logits are unchanged. Loads the
            large and the pruned model in float32, one after the other, which needs memory for each.
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
    from firefly_lightning.data.sources.records import find_sources
    from firefly_lightning.files.json_object import write_json
    from firefly_lightning.pruning import steps
    from firefly_lightning.pruning.verify import verify_pruning
    from firefly_lightning.pruning.vocabulary import load_bpe_tokenizer, read_texts, token_ids
    from firefly_lightning.pruning.weights_writer import CheckpointWriter

    # This is checked before the minutes that a large model takes.
    find_sources([*(corpus or []), *([keep] if keep else [])])
    if verify and next(read_texts(verify), None) is None:
        raise FireflyError(f"{verify}: has no text to verify with; give a file with a text a line")
    config, tensors = steps.open_large(Path(model))
    with new_folder(Path(out), inputs) as folder, CheckpointWriter(tensors, folder, link) as weights:
        large = steps.load_large(Path(model), config, tensors)
        steps.plan_tokenizer(large, corpus, tokenizer, min_count, keep)(folder)
        small = load_bpe_tokenizer(folder)
        small_ids = token_ids(small)
        rows = steps.vocabulary_rows(large.ids, small_ids, pad_multiple)
        weights.finish(rows)
        steps.write_configs(large, small, len(rows), folder)
        steps.keep_prompt_format(large, small, folder)
        verification = verify_pruning(large.tokenizer, folder, rows, verify) if verify else None
        report = steps.report(large, len(small_ids), len(rows))
        if weights.linked:
            report["linked"] = {name: str(file) for name, file in weights.linked.items()}
        if verification:
            report["verified"] = verification._asdict()
        report["seconds"] = round(time.perf_counter() - started, 2)
        write_json(report, folder / "pruning.json")
    _print_report(report, out)
    if verification:
        print(verification.summary())


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
    check_number("--pad_multiple", pad_multiple, most=65536)  # more would be rows of nothing but padding


def _print_report(report: dict[str, Any], out: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "before", "after", "kept", title=f"{escape(out)}, pruned in {report['seconds']:.1f} s")
    for name in ("tokens", "vocabulary", "parameters"):
        before, after, ratio = report[name].values()
        table.add_row(name, f"{before:,}", f"{after:,}", f"{ratio:.2%}")
    console = Console(emoji=False)  # a folder may be called :smile:
    console.print(table)
    if "linked" in report:
        linked = ", ".join(f"{name} is {file}" for name, file in report["linked"].items())
        console.print(escape(f"{linked}: what is written into one changes both models."), soft_wrap=True)
