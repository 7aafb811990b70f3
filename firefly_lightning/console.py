"""A table as plain text."""

from rich.console import Console
from rich.table import Table


def render(table: Table) -> str:
    """A table as plain text, 120 columns wide."""
    console = Console(width=120, color_system=None)  # plain also where a terminal is forced
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
