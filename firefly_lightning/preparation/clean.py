"""``firefly clean``: picks the rows that are worth training on."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.table import Table
from tqdm import tqdm

from firefly_lightning.console import render
from firefly_lightning.data.sources.known_forms import form_of
from firefly_lightning.data.sources.pair_forms import is_pair
from firefly_lightning.data.sources.records import DocumentPer, find_sources, read_records
from firefly_lightning.data.sources.row_texts import beside_all, names_of, printable
from firefly_lightning.errors import FireflyError, some
from firefly_lightning.files.atomic import check_new_file, new_file
from firefly_lightning.preparation.compared_rows import KeptRows, ValidationRows
from firefly_lightning.preparation.duplicates import Duplicate, Texts, sign
from firefly_lightning.preparation.row_checks import kind_of, texts_of, what_is_wrong

EXAMPLES = 5
"""Number of rows that the report shows of each kind and reason."""

SHOWN = 200
"""Number of characters of a text that the report shows."""

MANY = 10
"""Number of near duplicates beside the row that they repeat from which on a hint says where they may come from."""


def clean(
    files: list[str],
    out: str,
    val_files: list[str] | None = None,
    near_duplicates: float = 0.8,
    min_characters: int = 0,
    max_characters: int | None = None,
    report: str | None = None,
    document_per: Literal["line", "file"] = "line",
) -> None:
    """Leaves out rows that would spoil a training: broken, empty, repeated, or in the validation rows.

    Takes instruction rows, documents and pairs of answers in any accepted form, also several forms in one file, and raw
    task rows; rows that are kept are written as they were, documents of ``.txt`` files as ``{"text": …}``. Of
    duplicates the first is kept. Rows that are left out are counted by kind and reason, with examples in the report.

    Args:
        files: Files to clean (.jsonl, .json, .csv, .tsv, .parquet, .txt), globs, or datasets of the Hugging Face hub.
        out: The .jsonl file to write.
        val_files: Rows that must not be trained on: a row that equals or nearly equals one of them, or asks the same
            question, is left out.
        near_duplicates: Jaccard similarity of character 5-grams from which on two rows are near duplicates; 1 leaves
            out exact duplicates only.
        min_characters: Fewest characters of a row's whole text; shorter rows are left out.
        max_characters: Most characters of a row's whole text; longer rows are left out.
        report: The .json file with counts and examples; OUT.report.json by default.
        document_per: What of a .txt file is a document, as in ``data.document_per``.

    Raises:
        FireflyError: If a file cannot be read or written, or nothing is left.
    """
    if not 0 < near_duplicates <= 1:
        raise FireflyError(f"--near_duplicates {near_duplicates}: must be above 0 and at most 1")
    sources = find_sources(files)
    target = Path(out).expanduser().resolve()
    validation = find_sources(val_files or [])
    inputs = [*sources, *validation]
    reported = Path(report).expanduser().resolve() if report else Path(f"{target}.report.json")
    check_new_file(target, inputs)
    check_new_file(reported, inputs)
    if reported == target:
        raise FireflyError(f"--report {report}: is also --out; write to another file")
    lengths = range(min_characters, (max_characters or 2**62) + 1)
    forbidden = ValidationRows(_progress(validation, "validation rows", document_per), near_duplicates)
    findings = Findings()
    with new_file(target, inputs) as file:
        kept = KeptRows(file, near_duplicates)
        for where, row in _progress(sources, "cleaning", document_per):
            _sort(row, where, lengths, forbidden, kept, findings)
        if not findings.kept:
            raise FireflyError(f"{', '.join(sources)}: nothing is left of {findings.read} rows: {findings.reasons()}")
        with new_file(reported, inputs) as written:
            written.write(json.dumps(findings.as_json(), ensure_ascii=False, indent=1).encode())
    print("\n".join([findings.table(out), *findings.hints()]))


class Findings:
    """Counts and examples of what became of rows, by kind and reason."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.examples: defaultdict[str, defaultdict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self.neighbours: Counter[str] = Counter()
        self.raw, self.first_raw = 0, ""

    def count(self, kind: str, reason: str) -> None:
        """Counts one row more that was ``read``, ``kept``, or left out for a reason."""
        self.counts[kind][reason] += 1

    def leave_out(self, kind: str, reason: str, where: str, texts: Texts, like: str | None = None) -> None:
        """Counts one row more that was left out; the first such rows become examples."""
        self.count(kind, reason)
        if len(self.examples[kind][reason]) < EXAMPLES:
            shown = printable(texts.whole[:SHOWN])
            self.examples[kind][reason].append({"where": where, "text": shown, **({"like": like} if like else {})})

    def keep(self, kind: str, row: dict[str, Any]) -> None:
        """Counts one row more that was kept, and whether training can read it."""
        self.count(kind, "kept")
        if form_of(row) is None and not is_pair(row):
            self.first_raw = self.first_raw or printable(names_of(row))
            self.raw += 1

    @property
    def read(self) -> int:
        """Number of rows read."""
        return sum(counts["read"] for counts in self.counts.values())

    @property
    def kept(self) -> int:
        """Number of rows kept."""
        return sum(counts["kept"] for counts in self.counts.values())

    def totals(self) -> dict[str, int]:
        """Counts over all kinds: rows read and kept, then rows left out by reason, the commonest first."""
        totals: defaultdict[str, int] = defaultdict(int)
        for counts in self.counts.values():
            for reason, count in counts.items():
                totals[reason] += count
        return dict(sorted(totals.items(), key=lambda item: (item[0] not in ("read", "kept"), -item[1])))

    def reasons(self) -> str:
        """Why rows were left out, in words."""
        return ", ".join(f"{count} ({name})" for name, count in self.totals().items() if name not in ("read", "kept"))

    def hints(self) -> list[str]:
        """A line on rows that training cannot read, and one for each kind whose near duplicates follow their rows."""
        raw = (
            f"{self.raw:,} of the rows that were kept are in no form that training reads, and were taken for raw rows "
            f"of firefly build; the first has the fields {self.first_raw}; rename the columns of instruction rows"
        )
        return [raw] * bool(self.raw) + [
            f"{count:,} of {read:,} {kind} rows nearly repeat the row before them, "
            "as rows do that firefly build makes of one raw row by --per_row; "
            "to keep them, clean raw rows before they are built, or use --near_duplicates 1"
            for kind, count in self.neighbours.items()
            if count >= MANY and count >= 0.2 * (read := self.counts[kind]["read"])
        ]

    def as_json(self) -> dict[str, Any]:
        """The content of the report."""
        named = {beside_all(kind): counts for kind, counts in self.counts.items()}
        return {"counts": {"all": self.totals(), **named}, "examples": self.examples}

    def table(self, title: str) -> str:
        """The counts as a table with a line for each kind and one for all, and a column for each reason."""
        reasons = list(self.totals())
        table = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
        named = {beside_all(kind): counts for kind, counts in self.counts.items()}
        table.add_column("kind", min_width=max(map(cell_len, named)))
        for reason in reasons:
            table.add_column(reason, justify="right")
        for kind, counts in [*sorted(named.items()), ("all", self.totals())]:
            table.add_row(kind, *(f"{counts.get(reason, 0):,}" for reason in reasons))
        return render(table)


def _sort(
    row: dict[str, Any], where: str, lengths: range, forbidden: ValidationRows, kept: KeptRows, findings: Findings
) -> None:
    """Keeps a row, or leaves it out for the first reason there is."""
    kind, texts = kind_of(row, where), texts_of(row)
    findings.count(kind, "read")
    line = _line(row, where)
    if (reason := what_is_wrong(row, kind, texts, lengths)) or line is None:
        findings.leave_out(kind, reason or "broken characters", where, texts)
        return
    signature = sign(texts.whole)
    if like := forbidden.find(row, texts, signature):
        findings.leave_out(kind, "in the validation rows", where, texts, like)
    elif duplicate := kept.index.find(texts, signature):
        findings.leave_out(kind, _name(duplicate), where, texts, kept.where(duplicate.key))
        findings.neighbours[kind] += not duplicate.exact and kept.is_last(duplicate.key, where)
    else:
        findings.keep(kind, row)
        kept.add(line, where, signature)


def _line(row: dict[str, Any], where: str) -> bytes | None:
    """The line to write for a row; None where half a surrogate pair is in the row, be it in the name of a field.

    Raises:
        FireflyError: If a value of a table or a dataset has no place in a line of JSON.
    """
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n"
    except TypeError as error:
        names = [printable(name) for name, value in row.items() if not _fits(value)]
        message = f"{where}: the field {some(names)} holds {error}, which a line of JSON cannot; leave the column out"
        raise FireflyError(message) from error
    except UnicodeEncodeError:
        return None


def _plain(value: Any) -> str:
    """A time or an exact number of a table, as a text."""
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise TypeError(type(value).__name__)


def _fits(value: Any) -> bool:
    try:
        json.dumps(value, default=_plain)
    except TypeError:
        return False
    return True


def _name(duplicate: Duplicate) -> str:
    return "duplicate" if duplicate.exact else "near duplicate"


def _progress(sources: Sequence[str], name: str, document_per: DocumentPer) -> Iterator[tuple[str, dict[str, Any]]]:
    records = ((f"{source}:{line}", row) for source in sources for line, row in read_records(source, document_per))
    yield from tqdm(records, desc=name, unit=" rows", delay=2)
