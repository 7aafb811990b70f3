"""A plan as tables, as JSON and as a figure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from firefly_lightning.console import render
from firefly_lightning.planning.memory import PARTS, Estimate
from firefly_lightning.planning.runs import Run

GIGA = 1e9
COLORS = ("#4C78A8", "#9ECAE9", "#F58518", "#E45756", "#BAB0AC", "#54A24B", "#B279A2")
"""Of each part."""

MARKS = {False: "plain", True: "checkpointed"}


@dataclass(frozen=True)
class Planned:
    """A run and what it takes.

    Attributes:
        run: How the model is trained.
        rows: Of a micro-batch.
        takes: Memory.
    """

    run: Run
    rows: int
    takes: Estimate

    def fields(self) -> dict[str, Any]:
        """For JSON; memory in bytes."""
        return {
            "strategy": self.run.strategy,
            "devices": self.run.devices,
            "micro_batch_size": self.rows,
            "micro_batches": self.run.micro_batches,
            "gradient_checkpointing": self.run.checkpointing,
            "tokens": self.run.load.tokens,
            "peak": round(self.takes.peak),
            "peak_at": self.takes.peak_at,
            "device": {part: round(size) for part, size in self.takes.parts.items()},
            "host": {part: round(size) for part, size in self.takes.host.items()},
            "moments": {
                name: {part: round(size) for part, size in parts.items()} for name, parts in self.takes.moments.items()
            },
        }


def parts_table(planned: Sequence[Planned], title: str) -> str:
    """A line a strategy: GB of each part at the moment that needs most, their sum, and the host's."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("strategy", min_width=15)
    for heading in (*PARTS, "device", "host"):
        table.add_column(heading, justify="right")
    table.add_column("peak in")
    for one in planned:
        host = sum(one.takes.host.values())
        numbers = [*one.takes.parts.values(), one.takes.peak, host]
        table.add_row(one.run.strategy, *map(gigabytes, numbers), one.takes.peak_at)
    return f"{title}\n{render(table)}"


def grid_table(cells: dict[str, dict[str, str]], title: str, first: str = "strategy") -> str:
    """A line a name, a column a heading."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(first, min_width=15)
    for heading in dict.fromkeys(heading for row in cells.values() for heading in row):
        table.add_column(heading, justify="right")
    for name, row in cells.items():
        table.add_row(name, *row.values())
    return f"{title}\n{render(table)}"  # a title of the table's would be as narrow as it


def gigabytes(size: float) -> str:
    """One digit after the point, a dot for nothing."""
    return f"{size / GIGA:,.1f}" if size >= 0.05 * GIGA else "·"


def draw(path: Path, planned: Sequence[Planned], memory: dict[str, float], title: str) -> None:
    """Stacked bars of memory by part, one a strategy without checkpointing and one with, as a PNG.

    Args:
        path: The file.
        planned: In pairs, without checkpointing and with it.
        memory: Lines to draw, in bytes by name.
        title: Of the figure.
    """
    names = list(dict.fromkeys(one.run.strategy for one in planned))
    figure = Figure(figsize=(10, 1.8 + 0.62 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for part, color in zip(PARTS, COLORS, strict=True):
        for one in planned:
            before = sum(size for name, size in one.takes.parts.items() if PARTS.index(name) < PARTS.index(part))
            place = names.index(one.run.strategy) + (0.2 if one.run.checkpointing else -0.2)
            axes.barh(place, one.takes.parts[part] / GIGA, 0.36, before / GIGA, color=color)
        axes.barh(0, 0, color=color, label=part)
    for one in planned:
        place = names.index(one.run.strategy) + (0.2 if one.run.checkpointing else -0.2)
        host = sum(one.takes.host.values()) / GIGA
        more = f"  host {host:,.1f}" if host else ""
        label = f" {one.takes.peak / GIGA:,.1f} {MARKS[one.run.checkpointing]}{more}"
        axes.text(one.takes.peak / GIGA, place, label, va="center", fontsize=7)
    end = 1.25 * max(one.takes.peak for one in planned) / GIGA
    for name, size in memory.items():
        if size / GIGA < end:
            axes.axvline(size / GIGA, color="black", linestyle="--", linewidth=1)
            axes.text(size / GIGA, -0.65, f" {name}", fontsize=8, va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.85)
    axes.set_xlim(0, end)
    axes.set_xlabel("GB on each device, at the moment of a step that needs most")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def report(planned: Sequence[Planned], fits: Sequence[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """What is written as JSON: sizes in bytes."""
    model = planned[0].run.model
    return {
        "model": asdict(model) | {"parameters": model.parameters},
        **about,
        "largest_micro_batch": list(fits),
        "runs": [one.fields() for one in planned],
    }
