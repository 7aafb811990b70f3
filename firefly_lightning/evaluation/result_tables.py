"""Tables of what an evaluation has found, over all rows and by kind."""

from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table

from firefly_lightning.console import new_table
from firefly_lightning.model.metric_names import parted


def last_values(metrics: Mapping[str, Mapping[int, float]], stage: str, rows: Mapping[str, int]) -> Iterator[Table]:
    """The last value of every metric of a stage: a table of overall values, and a table with a row for each kind.

    Args:
        metrics: By the name of a metric, its values by step.
        stage: ``val`` or ``test``, with which the names of its metrics begin.
        rows: By kind, how many rows were evaluated; nothing where that is not known.
    """
    last = {name: values[max(values)] for name, values in metrics.items() if name.startswith(f"{stage}_") and values}
    named = {name: parted(name.removeprefix(f"{stage}_")) for name in last}
    overall = [(metric, shown(last[name])) for name, (metric, kind) in named.items() if kind is None]
    if not overall:
        return
    if rows:
        overall.insert(0, ("rows", f"{sum(rows.values()):,}"))
    yield filled_table(({"val": "validation", "test": "test"}[stage], ""), overall)
    columns = list(dict.fromkeys(metric for metric, kind in named.values() if kind is not None))
    of_kind: dict[str, dict[str, str]] = {}
    for name, (metric, kind) in named.items():
        if kind is not None:
            of_kind.setdefault(kind, {})[metric] = shown(last[name])
    for kind, count in rows.items():
        of_kind.setdefault(kind, {})["rows"] = f"{count:,}"
    if of_kind:
        columns = [*(["rows"] if rows else []), *columns]
        lines = [(kind, *(of_kind[kind].get(column, "–") for column in columns)) for kind in sorted(of_kind)]
        yield filled_table(("kind", *columns), lines)


def filled_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table whose first column holds names, and the others numbers."""
    made = new_table()
    for at, heading in enumerate(head):
        made.add_column(heading, justify="right" if at else "left")
    for row in rows:
        made.add_row(*row)
    return made


def shown(value: float) -> str:
    """A figure with four digits, or all those before the point."""
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
