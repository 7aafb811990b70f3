"""Tables: as plain text of the terminal's width, and in Markdown for files."""

import re
from collections.abc import Iterator, Sequence
from shutil import get_terminal_size

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

FALLBACK = 120
"""Columns of a table where neither a terminal nor ``COLUMNS`` says how wide it may be."""


def new_table(title: str | None = None) -> Table:
    """An empty table in the style of this project's."""
    return Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))


def render(table: Table, width: int | None = None) -> str:
    """A table as plain text; columns that do not fit stand in further tables below, each with the first column.

    Args:
        table: The table; its cells are shown as they are, whatever is in them.
        width: Characters of a line; by default ``COLUMNS`` or those of the terminal.
    """
    width = width or get_terminal_size((FALLBACK, 24)).columns
    # Plain also where a terminal is forced.
    console = Console(width=width, color_system=None, markup=False, emoji=False, highlight=False)
    parts = []
    for columns in _fitting(table.columns, width):
        with console.capture() as capture:
            console.print(_part(columns, width))
        parts.append("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()))
    # rich would break a title to the width of the table.
    return "\n".join([*([str(table.title)] if table.title else []), "\n".join(parts)])


def markdown(table: Table) -> str:
    """A table in Markdown, below its title."""
    columns = table.columns
    lines = [tuple(str(column.header) for column in columns), *_rows(columns)]
    rules = ["---:" if column.justify == "right" else "---" for column in columns]
    written = [f"| {' | '.join(map(escaped, line))} |" for line in lines]
    written.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join([*([f"{table.title}\n"] if table.title else []), *written])


def escaped(text: str) -> str:
    """A text on one line of Markdown, as itself: none of its characters is a mark, nor ends the cell of a table."""
    return re.sub(r"[\\`*\[\]|$]", r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def _fitting(columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """Groups of columns that fit beside the first one."""
    first, *others = columns
    group: list[Column] = []
    for column in others:
        if group and _taken([first, *group, column]) > width:
            yield [first, *group]
            group = []
        group.append(column)
    yield [first, *group]


def _part(columns: Sequence[Column], width: int) -> Table:
    """A table of some columns, none of which cuts a number; the first one, of names, is folded where it is too wide."""
    spare = width - _taken(columns)
    widths = [_needed(column) for column in columns]
    if spare < 0:
        widths[0] = max(widths[0] + spare, 8)
    for at, column in enumerate(columns):  # a heading needs no second line where there is room
        more = min(max(spare, 0), max(0, cell_len(str(column.header)) - widths[at]))
        widths[at] += more
        spare -= more
    part = new_table()
    for column, own in zip(columns, widths, strict=True):
        part.add_column(column.header, justify=column.justify, width=own, overflow="fold")
    for cells in _rows(columns):
        part.add_row(*cells)
    return part


def _rows(columns: Sequence[Column]) -> Iterator[tuple[str, ...]]:
    yield from zip(*([str(cell) for cell in column.cells] for column in columns), strict=True)


def _needed(column: Column) -> int:
    """Characters that a column takes at least: its widest cell, or the longest word of its heading."""
    return max(map(cell_len, [*str(column.header).split(), *map(str, column.cells), ""]))


def _taken(columns: Sequence[Column]) -> int:
    """Characters that columns take at least, with the space around them."""
    return sum(_needed(column) + 2 for column in columns) + 1
