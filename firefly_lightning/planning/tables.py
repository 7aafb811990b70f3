"""Tables of a plan for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from firefly_lightning.console import new_table, render
from firefly_lightning.planning.memory import PARTS
from firefly_lightning.planning.planned import Planned

GIGA = 1e9


def parts_table(planned: Sequence[Planned], title: str) -> str:
    """A table with a line for each run: GB of each part at the moment that needs most, their sum, and the host's."""
    table = new_table(title)
    table.add_column("strategy")
    for heading in (*PARTS, "device", "host"):
        table.add_column(heading, justify="right")
    table.add_column("peak in")
    for one in planned:
        host = sum(one.takes.host.values())
        numbers = [*one.takes.parts.values(), one.takes.peak, host]
        table.add_row(one.run.strategy, *map(gigabytes, numbers), one.takes.peak_at)
    return render(table)


def grid_table(cells: dict[str, dict[str, str]], title: str, first: str = "strategy") -> str:
    """A table with a line for each name and a column for each heading.

    Args:
        cells: Text of each cell, by name and heading.
        title: Title of the table.
        first: Heading of the column of names.
    """
    table = new_table(title)
    table.add_column(first)
    for heading in dict.fromkeys(heading for row in cells.values() for heading in row):
        table.add_column(heading, justify="right")
    for name, row in cells.items():
        table.add_row(name, *row.values())
    return render(table)


def ways_table(found: Sequence[Mapping[str, Any]], title: str) -> str:
    """A table with a line for each way to train: the rows of a micro-batch, and GB of the device and the host.

    Args:
        found: Ways on one memory, as :func:`firefly_lightning.planning.ways.ways` gives them.
        title: Title of the table.
    """
    table = new_table(title)
    table.add_column("way")
    table.add_column("precision")
    for heading in ("rows at a time", "GB", "host"):
        table.add_column(heading, justify="right")
    for one in found:
        recomputed = ", recomputed" if one["gradient_checkpointing"] else ""
        rows = f"{one['micro_batch_size']}{recomputed}" if one["micro_batch_size"] else "needs"
        table.add_row(one["way"], one["precision"], rows, gigabytes(one["peak"]), gigabytes(one["host"]))
    return render(table)


def gigabytes(size: float) -> str:
    """A size in bytes as GB with one digit after the point; a dot where that would be 0."""
    return f"{size / GIGA:,.1f}" if size >= 0.05 * GIGA else "·"
