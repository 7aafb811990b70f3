"""A table as plain text."""

from rich.console import Console
from rich.table import Table


def render(table: Table) -> str:
    """A table as plain text, 120 columns wide."""
    # Plain also where a terminal is forced, and as it is: a kind called [/x] is no markup.
    console = Console(width=120, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
