"""``firefly stats``: what a set of rows is made of, in numbers and figures."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.table import Table

from firefly_lightning.console import render
from firefly_lightning.data.sources.records import find_sources
from firefly_lightning.errors import FireflyError, check_number
from firefly_lightning.files.atomic import check_new_folder, new_folder
from firefly_lightning.prompt import PromptEncoder, prompt_format

ALL = "all"
COLUMNS = {
    "rows": "rows",
    "share": "share",
    "mean": "mean tokens",
    "p50": "median",
    "p90": "90 %",
    "p99": "99 %",
    "longest": "longest",
    "windows": "windows",
    "beyond": "over {0}",
    "truncated_tokens": "tokens cut",
    "no_target": "no target left",
    "padding": "padding",
}


def stats(
    files: list[str],
    tokenizer: str,
    out: str,
    max_length: int = 512,
    too_long: Literal["truncate", "truncate_keep_end", "drop"] = "truncate",
    prompt: str | None = None,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    seed: int = 0,
    font: str | None = None,
    learn: Literal["all", "last"] = "all",
    document_per: Literal["line", "file"] = "line",
    stride: int = 1,
) -> None:
    """Counts rows and tokens by kind, and draws the task distribution and the histogram of token lengths.

    Writes ``tasks.png``, ``lengths.png`` and ``stats.json``, and prints a table. What is cut and padded is what a
    training with the same settings on one device cuts and pads in its first epoch. Rows that training would refuse are
    counted by reason and passed over. A pair of answers counts as two rows, each of the prompt and one answer.

    Args:
        files: Instruction rows, documents and pairs: files, globs or names of datasets, as for training.
        tokenizer: Folder or hub name of the tokenizer or the model.
        out: The folder to write, new or empty.
        max_length: Most tokens of a row, as in ``data.max_length``; the histogram has a line there.
        too_long: What to do with a longer row, as in ``data.too_long``.
        prompt: Name of a prompt format, as in ``data.prompt``; by default the one that the model was trained with.
        batch_size: Rows in one optimizer step, as in ``data.batch_size``.
        micro_batch_size: Rows that the device works on at a time, as in ``data.micro_batch_size``.
        seed: Seed of the order of rows, as in ``data.seed``.
        font: A font file for the names of kinds; by default an installed one that has their characters.
        learn: Which targets of a row are learned, as in ``data.learn``.
        document_per: What of a .txt file is a document, as in ``data.document_per``.
        stride: Tokens that two windows of a longer document share, as in ``data.stride``.

    Raises:
        FireflyError: If a file cannot be read or written, or no row of the files can be learned.
    """
    if max_length < 1 or batch_size < 1:
        raise FireflyError("--max_length and --batch_size must be at least 1")
    check_number("data.micro_batch_size", micro_batch_size, least=1)
    folder, sources = Path(out).expanduser(), find_sources(files)
    inputs = [*sources, tokenizer, *([font] if font else [])]
    check_new_folder(folder, inputs)
    from firefly_lightning.data.counts_table import unused_fields
    from firefly_lightning.data.prompt_choice import choose_format
    from firefly_lightning.data.sources.any_record import answers_of_pair
    from firefly_lightning.data.sources.row_forms import RowRules
    from firefly_lightning.data.token_cache import WHOLE, default_cache_dir, tokenize
    from firefly_lightning.data.tokenized_rows import TokenizedRows
    from firefly_lightning.huggingface import load_tokenizer
    from firefly_lightning.preparation.figures import draw_lengths, draw_tasks, find_font, font_or_default
    from firefly_lightning.preparation.token_counts import describe, histogram, padding_of

    if font:
        find_font("", font)  # a file that is no font is told before rows are read
    cache = default_cache_dir()
    told, loaded = prompt_format(prompt) if prompt is not None else None, load_tokenizer(tokenizer)
    encoder = PromptEncoder(loaded, choose_format(told, tokenizer, loaded, partial(print, file=sys.stderr)))
    rules = RowRules(learn=learn, counting_faults=True, document_per=document_per, read=answers_of_pair)
    whole, cut = (
        TokenizedRows([tokenize(one, encoder, length, too_long, cache, rules, stride) for one in sources], sources)
        for length in (WHOLE, max_length)
    )
    refused = [f"{name}: {_refused(faults)}" for name, faults in zip(sources, whole.faults, strict=True) if faults]
    if not len(whole):
        raise FireflyError(f"no row can be learned: {'; '.join(refused) or 'no target is learned'}")
    counted = describe(whole, cut, padding_of(cut, batch_size, micro_batch_size, seed), max_length)
    print("\n".join([table(counted, max_length), *refused, *unused_fields(whole)]))
    found, lacking = font_or_default("".join(whole.kinds), font)
    with new_folder(folder, inputs) as scratch:
        draw_tasks(scratch / "tasks.png", {kind: of["rows"] for kind, of in counted.items() if kind != ALL}, found)
        draw_lengths(scratch / "lengths.png", whole.lengths, max_length)
        report = {
            "files": sources,
            "max_length": max_length,
            "too_long": too_long,
            "kinds": counted,
            "refused": dict(sum(map(Counter, whole.faults), Counter())),
            "unused": dict(sum(map(Counter, whole.unused), Counter())),
            "histogram": histogram(whole.lengths),
        }
        (scratch / "stats.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
    if lacking:
        print(f"tasks.png: names of kinds are not readable: {lacking}", file=sys.stderr)
    print(f"{folder}: tasks.png, lengths.png, stats.json")


def _refused(faults: dict[str, int]) -> str:
    counted = ", ".join(f"{count:,} ({fault})" for fault, count in sorted(faults.items()))
    return f"rows that training refuses: {counted}; firefly clean leaves out all but those in no form"


def table(counted: dict[str, dict[str, Any]], max_length: int) -> str:
    """The counts as a table with a line for each kind and one for all."""
    made = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("kind", min_width=max(map(cell_len, counted)))
    columns = {name: heading for name, heading in COLUMNS.items() if name != "windows" or counted[ALL][name]}
    for heading in columns.values():
        made.add_column(heading.format(max_length), justify="right")
    for kind, of in [*((kind, of) for kind, of in counted.items() if kind != ALL), (ALL, counted[ALL])]:
        made.add_row(kind, *(_written(name, of[name]) for name in columns))
    return render(made)


def _written(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2%}" if name in ("share", "beyond", "padding") else f"{value:,.0f}"
