"""Draws a plan as a figure."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from firefly_lightning.planning.memory import PARTS
from firefly_lightning.planning.planned import Planned
from firefly_lightning.planning.tables import GIGA

COLORS = ("#4C78A8", "#9ECAE9", "#F58518", "#E45756", "#BAB0AC", "#54A24B", "#B279A2")
"""Colors of the parts of memory, in the order of ``PARTS``."""

MARKS = {False: "plain", True: "checkpointed"}
"""Labels of bars, by whether activations are recomputed."""


def draw(path: Path, planned: Sequence[Planned], memory: dict[str, float], title: str) -> None:
    """Draws memory by part as stacked bars, two for each strategy: without checkpointing and with it.

    Args:
        path: PNG file to write.
        planned: The planned runs, in pairs without checkpointing and with it.
        memory: Memory of devices to draw as lines, in bytes by name.
        title: Title of the figure.
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
