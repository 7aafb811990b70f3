"""What ``firefly clean`` says of the rows: counts by kind and reason, examples, and hints."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.table import Table

from firefly_lightning.console import render
from firefly_lightning.data.sources.row_texts import beside_all

EXAMPLES = 5
"""Number of rows that the report shows of each kind and reason."""

MANY = 10
"""Number of near duplicates beside the row that they repeat from which on a hint says where they may come from."""


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

    def leave_out(self, kind: str, reason: str, example: Callable[[], dict[str, str]]) -> None:
        """Counts one row more that was left out; the first such rows become examples, which are asked for then."""
        self.count(kind, reason)
        if len(self.examples[kind][reason]) < EXAMPLES:
            self.examples[kind][reason].append(example())

    def keep(self, kind: str, names: Callable[[], str] | None) -> None:
        """Counts one row more that was kept.

        Args:
            kind: Its kind.
            names: Names of its fields, in words, where training cannot read it.
        """
        self.count(kind, "kept")
        if names:
            self.first_raw = self.first_raw or names()
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
