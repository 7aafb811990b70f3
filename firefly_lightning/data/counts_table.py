"""A table of what a set of rows is made of."""

from collections import Counter
from collections.abc import Callable, Sequence

from rich.table import Table

from firefly_lightning.console import new_table, render
from firefly_lightning.data.sources.row_texts import beside_all
from firefly_lightning.data.tokenized_rows import COUNTED, Counts, TokenizedRows
from firefly_lightning.errors import some

HEADINGS = {
    "rows": "rows read",
    "windows": "windows",
    "truncated": "truncated",
    "dropped": "too long, left out",
    "no_target": "no target left, left out",
    "unanswered": "last turn not answered",
    "tokens": "tokens kept",
    "target_tokens": "tokens learned",
}


def row_summary(rows: TokenizedRows, written: Callable[[Table], str] = render) -> str:
    """The table of counts, and a line for each source that has text in fields which are not read."""
    return "\n".join([counts_table(rows.names, rows.counts, written), *unused_fields(rows)])


def unused_fields(rows: TokenizedRows) -> list[str]:
    """A line for each source that has text in fields which no form of rows reads, with the number of rows of each."""
    lines = []
    for name, unused in zip(rows.names, rows.unused, strict=True):
        counted = [f"{field} ({count:,})" for field, count in sorted(unused.items(), key=lambda one: (-one[1], one[0]))]
        if counted:
            lines.append(
                f"{name}: nothing is learned of the text in these fields, here with their rows: {some(counted, 10)}"
            )
    return lines


def counts_table(names: Sequence[str], counts: Sequence[Counts], written: Callable[[Table], str] = render) -> str:
    """A table of the rows that were read, cut, left out and kept: a line for each kind, and one for all kinds.

    Args:
        names: Names of the sources, for the title.
        counts: The counts of each source.
        written: What makes a text of the table: ``render`` for a terminal, ``markdown`` for a file.
    """
    totals = counts_by_kind(counts)
    totals["all"] = sum(totals.values(), Counter())
    table = new_table(title=", ".join(names))
    table.add_column("kind")
    columns = [name for name in COUNTED if name != "windows" or totals["all"][name]]  # only documents have any
    for name in columns:
        table.add_column(HEADINGS[name], justify="right")
    for kind, numbers in totals.items():
        table.add_row(kind, *(f"{numbers[name]:,}" for name in columns))
    return written(table)


def counts_by_kind(counts: Sequence[Counts]) -> dict[str, Counter[str]]:
    """What all sources together hold of each kind, in the order of the kinds' names."""
    totals: dict[str, Counter[str]] = {}
    for source in counts:
        for kind, numbers in source.items():
            totals.setdefault(beside_all(kind), Counter()).update(numbers)
    return {kind: totals[kind] for kind in sorted(totals)}
