"""Prints plans on the console: memory by part and by micro-batch, and the largest micro-batch that fits."""

from collections.abc import Sequence
from typing import Any

from firefly_lightning.planning.planned import Planned
from firefly_lightning.planning.request import Settings
from firefly_lightning.planning.tables import gigabytes, grid_table, parts_table


def devices(count: int) -> str:
    """A number of devices in words, such as ``2 devices``."""
    return "1 device" if count == 1 else f"{count} devices"


def place(one: Planned) -> str:
    """Says on how many devices a run is planned, and how many rows its micro-batches have."""
    return f"{devices(one.run.devices)}, micro-batches of {one.rows} row{'s' if one.rows > 1 else ''}"


def at_hand(settings: Settings, planned: Sequence[Planned], both: bool = False) -> list[Planned]:
    """The planned runs that have the devices, micro-batch and checkpointing of the configuration.

    Args:
        settings: The configuration.
        planned: All planned runs.
        both: Whether to return runs with and without checkpointing, whatever the configuration says.

    Returns:
        Runs on the first planned number of devices; with the most rows, if none has those of the configuration.
    """
    first = [one for one in planned if one.run.devices == planned[0].run.devices]
    known = {one.rows for one in first}
    wanted = settings.own_rows("ddp", planned[0].run.devices)
    rows = wanted if wanted in known else max(known)
    return [one for one in first if one.rows == rows and (both or one.run.checkpointing == settings.checkpointing)]


def print_parts(settings: Settings, planned: Sequence[Planned]) -> None:
    """Prints the memory of each strategy by part, for the micro-batch of the configuration."""
    shown = at_hand(settings, planned)
    recomputed = "with" if settings.checkpointing else "without"
    print(parts_table(shown, f"GB a device, {place(shown[0])}, {recomputed} checkpointing"))


def print_totals(settings: Settings, planned: Sequence[Planned]) -> None:
    """Prints the memory of each strategy by rows of a micro-batch, in a table for each number of devices."""
    for count in dict.fromkeys(one.run.devices for one in planned):
        here = [one for one in planned if one.run.devices == count]
        columns = sorted({one.rows for one in here})
        cells = {one.run.strategy: {str(rows): "" for rows in columns} for one in here}
        for one in here:
            total = gigabytes(one.takes.peak)
            before = cells[one.run.strategy][str(one.rows)]
            cells[one.run.strategy][str(one.rows)] = f"{before} / {total}" if before else total
        print(grid_table(cells, f"GB a device, {devices(count)}, by rows of a micro-batch: plain / checkpointed"))


def largest(planned: Sequence[Planned], limits: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of the largest planned micro-batch that fits on a device, by memory, strategy and devices.

    Args:
        planned: All planned runs.
        limits: Memory of devices in bytes, by name.

    Returns:
        For each combination the rows without checkpointing (``plain``) and with it; 0 where no micro-batch fits.
    """
    kinds = dict.fromkeys((one.run.strategy, one.run.devices) for one in planned)
    return [
        {
            "memory": text,
            "strategy": name,
            "devices": count,
            **{
                key: max(
                    (
                        one.rows
                        for one in planned
                        if (one.run.strategy, one.run.devices, one.run.checkpointing) == (name, count, recomputed)
                        and one.takes.peak <= limit
                    ),
                    default=0,
                )
                for key, recomputed in (("plain", False), ("checkpointed", True))
            },
        }
        for text, limit in limits.items()
        for name, count in kinds
    ]


def print_largest(fits: Sequence[dict[str, Any]], limits: dict[str, float]) -> None:
    """Prints the most rows of a micro-batch that fit, in a table for each size of memory."""
    for text in limits:
        cells: dict[str, dict[str, str]] = {}
        here = [fit for fit in fits if fit["memory"] == text]
        headings = [devices(count) for count in dict.fromkeys(fit["devices"] for fit in here)]
        for fit in here:
            row = cells.setdefault(fit["strategy"], dict.fromkeys(headings, ""))
            row[devices(fit["devices"])] = f"{fit['plain'] or '–'} / {fit['checkpointed'] or '–'}"
        print(grid_table(cells, f"Most rows of a micro-batch in {text}: plain / checkpointed"))
