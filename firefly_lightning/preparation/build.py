"""``firefly build``: turns raw task rows into a file of instruction rows."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from firefly_lightning.data.sources.chunks import Chunk, read_chunks, records_of
from firefly_lightning.data.sources.records import find_sources, identify_source, read_records
from firefly_lightning.data.sources.row_texts import printable
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import check_new_file
from firefly_lightning.files.resumable import ResumableFile, code_digest
from firefly_lightning.preparation import columns as columns_module
from firefly_lightning.preparation.columns import Columns, read_assignments
from firefly_lightning.preparation.templates import fill as templates_module
from firefly_lightning.preparation.templates import views as template_views_module
from firefly_lightning.preparation.templates.fill import Templates, UnusableRowError
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER, load_templates
from firefly_lightning.processes import map_in_order

ROWS_PER_CHUNK = 1000
"""Number of raw rows that a process works on at a time; a killed build goes on after the last chunk written."""

ROWS_LOOKED_AT = 100
"""Number of rows of a source whose columns are compared with what the templates read, before anything is built."""

REASONS, OTHERS = 50, "other reasons"
"""How many reasons are counted apart, and the name of all others: every bad row may have a reason of its own."""

BadRows = Literal["stop", "skip"]
"""What becomes of a row that cannot be used: it ends the command with its line, or is left out and counted."""

Unusable = Literal["leave_out", "keep"]
"""What becomes of a row that holds a word by which its template file knows rows that make no good instruction."""


def build(
    kind: str,
    source: list[str],
    out: str,
    templates: str | None = None,
    seed: int = 0,
    per_row: int | Literal["all"] = 1,
    rename: list[str] | None = None,
    constant: list[str] | None = None,
    only: list[str] | None = None,
    bad_rows: BadRows = "stop",
    workers: int | None = None,
    unusable: Unusable = "leave_out",
) -> None:
    """Turns raw task rows into instruction rows through the hand-written templates of their kind.

    Which templates a row gets follows from the seed and the position of the row alone. An existing output file is
    replaced once everything has gone well, and stays as it is otherwise. A build that was killed goes on where it was
    when the same command is given again.

    Args:
        kind: Name of the task: one that comes with the package, or the name of a file in the folder of templates.
        source: Files of raw rows (.jsonl, .json, .csv, .tsv, .parquet), globs, or datasets of the Hugging Face hub.
        out: The .jsonl file to write.
        templates: A folder of your own KIND.yaml files, in place of the package's.
        seed: Seed by which templates are drawn; another seed draws other templates.
        per_row: Instruction rows to make of each raw row, each through another template; ``all`` takes every template
            that serves the row.
        rename: COLUMN=FIELD for columns that the templates know by another name.
        constant: FIELD=TEXT for fields that hold the same text in all rows.
        only: COLUMN=TEXT to take only rows whose column holds the text; the other rows are counted.
        bad_rows: What to do about a row that lacks a field, or holds what no template knows: ``stop`` the build and
            name the row's line, or ``skip`` the row and count it.
        workers: Number of processes to work with; one for each core by default.
        unusable: Whether to ``leave_out`` and count rows that hold a word which the template file lists under
            ``unusable``, or to ``keep`` them.

    Raises:
        FireflyError: If templates, rows or the output file are not as they must be; with file and line.
    """
    _check_positive(per_row=1 if per_row == "all" else per_row, workers=1 if workers is None else workers)
    folder = Path(templates).expanduser() if templates else TEMPLATE_FOLDER
    flags = {"--rename": rename, "--constant": constant, "--only": only}
    columns = Columns(*(read_assignments(texts, flag) for flag, texts in flags.items()))
    filled = load_templates(kind, folder)
    filled = filled if unusable == "leave_out" else replace(filled, unusable={})
    work = ChunkBuilder(filled, columns, seed, per_row, bad_rows)
    sources = find_sources(source)
    target = Path(out).expanduser().resolve()
    template_file = folder / f"{kind}.yaml"
    check_new_file(target, [*sources, template_file])
    for name in sources:
        _check_columns(work, name)
    identity = [
        template_file.read_text("utf-8"),
        seed,
        per_row,
        columns,
        bad_rows,
        unusable,
        [identify_source(name) for name in sources],
        _CODE,
    ]
    with ResumableFile(target, json.dumps(identity)) as file:
        totals = _write(file, sources, work, kind, workers)
        if not totals.written:
            raise FireflyError(f"{', '.join(sources)}: nothing to write: {totals.describe()}")
    print(f"{out}: {totals.written} {kind} rows from {totals.describe()}")


class Totals(NamedTuple):
    """What became of raw rows: how many were read, instruction rows written, and raw rows lost, by reason."""

    read: int = 0
    written: int = 0
    lost: dict[str, int] = {}  # noqa: RUF012 (never changed)

    def plus(self, other: "Totals") -> "Totals":
        """The sum of both totals, with the rarest of many reasons under one name."""
        lost = Counter(self.lost) + Counter(other.lost)
        rare = [] if len(lost) <= REASONS else lost.most_common()[REASONS - 1 :]
        for reason, count in rare:
            del lost[reason]
            lost[OTHERS] += count
        return Totals(self.read + other.read, self.written + other.written, lost)

    def describe(self) -> str:
        """The totals in words; beyond the commonest reasons, only how many rows were lost."""
        common = Counter(self.lost).most_common(10)
        reasons = [f"{count} ({reason})" for reason, count in common]
        if others := sum(self.lost.values()) - sum(count for _, count in common):
            reasons.append(f"{others} ({OTHERS})")
        return f"{self.read} raw rows, lost {', '.join(reasons) or 'none'}"


class Numbered(NamedTuple):
    """Consecutive raw rows: the position of the first among all, counted from 1, and where they are.

    Of them, the first ones are ``skipped`` where an earlier run has built them.
    """

    first: int
    rows: Chunk
    skipped: int


@dataclass(frozen=True)
class ChunkBuilder:
    """Makes the instruction rows of a chunk; this object can be sent to another process."""

    templates: Templates
    columns: Columns
    seed: int
    per_row: int | Literal["all"]
    bad_rows: BadRows

    def __call__(self, chunk: Numbered) -> tuple[bytes, Totals]:
        """The instruction rows of a chunk, a JSON object a line, and what became of its raw rows."""
        lost: Counter[str] = Counter()
        lines: list[str] = []
        rows = islice(enumerate(records_of(chunk.rows), chunk.first), chunk.skipped, None)
        for number, (line, row) in rows:
            where = f"{chunk.rows.source}:{line}"
            try:
                built = self._fill(row, where, number)
                lines += [_ENCODER.encode(filled) + "\n" for filled in built]
            except UnusableRowError as reason:
                lost[printable(str(reason))] += 1
            except FireflyError as error:
                if self.bad_rows == "stop":
                    raise FireflyError(
                        f"{error}; or leave such rows out and have them counted with --bad_rows skip"
                    ) from error
                lost[printable(str(error).removeprefix(f"{where}: "))] += 1
        return "".join(lines).encode(), Totals(chunk.rows.size - chunk.skipped, len(lines), lost)

    def _fill(self, row: dict[str, Any], where: str, number: int) -> list[dict[str, str]]:
        if reason := self.columns.why_not(row):
            raise UnusableRowError(reason)
        per_row = None if self.per_row == "all" else self.per_row
        return self.templates.fill(self.columns.apply(row), where, seed=self.seed, number=number, per_row=per_row)


def _write(
    file: ResumableFile,
    sources: Sequence[str],
    work: Callable[[Numbered], tuple[bytes, Totals]],
    kind: str,
    workers: int | None,
) -> Totals:
    totals = Totals(*(file.state or ()))
    if totals.read:
        print(f"{file.target}: going on after {totals.read} raw rows, where an earlier build ended")
    with tqdm(desc=kind, unit=" rows", delay=2, initial=totals.read) as progress:
        for text, built in map_in_order(work, _chunks(sources, totals.read), workers):
            totals = totals.plus(built)
            file.append(text, totals)
            progress.update(built.read)
    return totals


def _chunks(sources: Sequence[str], skipped: int) -> Iterator[Numbered]:
    first = 1
    for source in sources:
        for rows in read_chunks(source, ROWS_PER_CHUNK):
            if first + rows.size > skipped + 1:
                yield Numbered(first, rows, max(skipped + 1 - first, 0))
            first += rows.size


def _check_columns(work: ChunkBuilder, source: str) -> None:
    looked_at = [row for _, row in islice(read_records(source), ROWS_LOOKED_AT)]
    if looked_at:
        columns = list(dict.fromkeys(name for row in looked_at for name in row))
        work.columns.check(columns, source)
        work.templates.check_columns(work.columns.apply(dict.fromkeys(columns)), source)


def _check_positive(**flags: int) -> None:
    for name, value in flags.items():
        if value < 1:
            raise FireflyError(f"--{name} {value}: must be at least 1")


_ENCODER = json.JSONEncoder(ensure_ascii=False)

_CODE = code_digest(
    __file__, *(str(module.__file__) for module in (columns_module, template_views_module, templates_module))
)
