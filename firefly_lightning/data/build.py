"""Raw task rows into a file of instruction rows: what is behind ``firefly build``."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from firefly_lightning.data.records import find_sources, read_records
from firefly_lightning.data.template_files import load_templates
from firefly_lightning.data.templates import Templates, UnusableRowError
from firefly_lightning.errors import FireflyError, describe_os_error


def build(
    kind: str, source: list[str], out: str, templates: str | None = None, seed: int = 0, per_row: int = 1
) -> None:
    """Turns raw task rows into instruction rows through the hand-written templates of their kind.

    Which templates a row gets follows from the seed and the position of the row alone. An existing file is replaced
    once everything has gone well, and stays as it is otherwise.

    Args:
        kind: The task: Dictionary, NER, SentimentAnalyze, or the name of a file in the folder of templates.
        source: Files of raw rows (.jsonl, .json, .parquet), globs, or datasets of the Hugging Face hub.
        out: The .jsonl file to write.
        templates: A folder of your own KIND.yaml files, in place of the package's.
        seed: Another seed draws other templates.
        per_row: Instruction rows to make of each raw row, each through another template.

    Raises:
        FireflyError: If templates, rows or the output file are not as they must be; with file and line.
    """
    if per_row < 1:
        raise FireflyError(f"--per_row {per_row}: must be at least 1")
    chosen = load_templates(kind, Path(templates).expanduser() if templates else None)
    sources = find_sources(source)
    target = Path(out).expanduser().resolve()
    if target in {Path(name).resolve() for name in sources}:
        raise FireflyError(f"{out}: is also a source; write to another file")
    lost: Counter[str] = Counter()
    read = written = 0
    with _replacing(target) as file:
        for rows in _instructions(chosen, sources, lost, seed, per_row):
            read += 1
            written += len(rows)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not written:
            raise FireflyError(f"{', '.join(sources)}: nothing to write: {read} raw rows, lost {_summary(lost)}")
    print(f"{out}: {written} {kind} rows from {read} raw rows, lost {_summary(lost)}")


def _instructions(
    templates: Templates, sources: Sequence[str], lost: Counter[str], seed: int, per_row: int
) -> Iterator[list[dict[str, str]]]:
    records = ((f"{source}:{line}", row) for source in sources for line, row in read_records(source))
    for number, (where, row) in enumerate(tqdm(records, desc=templates.kind, unit=" rows", delay=2), 1):
        try:
            yield templates.fill(row, where, seed=seed, number=number, per_row=per_row)
        except UnusableRowError as reason:
            lost[str(reason)] += 1
            yield []


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of ``path`` in one step when all went well, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise FireflyError(f"{path}: is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise FireflyError(describe_os_error(error, path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _summary(lost: Counter[str]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in lost.most_common()) or "none"
