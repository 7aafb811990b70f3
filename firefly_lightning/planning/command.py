"""``firefly plan``: what a run takes in memory, steps and tokens, before a weight is loaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import check_new_folder, new_folder
from firefly_lightning.planning.comparing import compare
from firefly_lightning.planning.figure import draw
from firefly_lightning.planning.planned import Planned, report
from firefly_lightning.planning.request import Settings, describe, read_settings, sizes_line
from firefly_lightning.planning.runs import STRATEGIES
from firefly_lightning.planning.tables import gigabytes, grid_table, parts_table

MEMORY = ("24GB", "80GB")
"""Sizes of devices that a plan is held against by default."""

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def plan(
    configs: list[str] | None = None,
    model: str | None = None,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    n_layer: int | None = None,
    n_head: int | None = None,
    strategies: list[str] | None = None,
    devices: list[int] | None = None,
    micro_batch_sizes: list[int] | None = None,
    precision: str | None = None,
    memory: list[str] | None = None,
    measure: bool = False,
    out: str | None = None,
) -> None:
    """Says what a run takes before it is started: memory by strategy, steps and tokens, and what fits on a device.

    Nothing is loaded but the model's ``config.json`` and, where they are on this machine, tokenizer and rows, whose
    real lengths then count: a micro-batch is that of the longest rows. Without them, every row has ``max_length``
    tokens, and all are learned. On a GPU, CUDA's own memory (half a GB or so) comes on top.

    Args:
        configs: YAML files of the run, also as ``--config A.yaml --config B.yaml``, as ``firefly-fit fit`` takes them.
        model: Folder, hub name or ``config.json`` of the model; by default that of the configuration.
        vocab_size: Sizes of a model that is not here; all four are needed.
        hidden_size: Likewise.
        n_layer: Likewise.
        n_head: Likewise.
        strategies: Which to plan; all by default.
        devices: Numbers of devices; 1, 2, 4 and 8 by default, the configuration's first.
        micro_batch_sizes: Rows that a device works on at a time; by default all that divide its share of a step.
        precision: 32-true, bf16-mixed or 16-mixed; by default that of the configuration.
        memory: Of a device, such as 24GB (10^9 bytes) or 24GiB; 24GB and 80GB by default.
        measure: Also train two steps after a first one on this machine, with each of ``strategies``, ``devices`` and
            ``micro_batch_sizes``, by default those of the configuration, and compare.
        out: A folder to write ``plan.json`` and ``memory.png`` into, new or empty.

    Raises:
        FireflyError: If the model is not known, or a value cannot be.
    """
    given = {"vocab_size": vocab_size, "hidden_size": hidden_size, "n_layer": n_layer, "n_head": n_head}
    settings = read_settings(configs or [], model, given, precision, devices)
    inputs = [*(configs or []), model or settings.fit.model.init_args.path]
    limits = {text: _bytes(text) for text in memory or MEMORY}
    if measure and any(given.values()):
        raise FireflyError("--measure trains the model of --config: leave --vocab_size and the other sizes out")
    for name in strategies or ["auto"]:
        settings.run(name, 1, 1, False, refuse=True)
    if out:
        check_new_folder(Path(out).expanduser(), inputs)
    about = describe(settings)
    planned = _plan_all(settings, strategies or STRATEGIES, micro_batch_sizes)
    _print_parts(settings, planned)
    _print_totals(settings, planned)
    fits = _largest(planned, limits)
    _print_largest(fits, limits)
    measured = compare(settings, strategies, devices, micro_batch_sizes) if measure else []
    if out:
        with new_folder(Path(out).expanduser(), inputs) as scratch:
            content = report(planned, fits, about | {"measured": measured})
            (scratch / "plan.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
            shown = _at_hand(settings, planned, both=True)
            draw(scratch / "memory.png", shown, limits, f"{sizes_line(settings)}, {_place(shown[0])}")
        print(f"{out}: plan.json, memory.png")


def _plan_all(settings: Settings, strategies: Sequence[str], sizes: Sequence[int] | None) -> list[Planned]:
    planned = [
        one
        for count in settings.counts
        for name in strategies
        for rows in settings.sizes(name, count, sizes)
        for checkpointing in (False, True)
        if (one := settings.planned(name, count, rows, checkpointing))
    ]
    if not planned:
        raise FireflyError("none of these strategies, devices and micro-batches go together; give others")
    return planned


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    if not found:
        raise FireflyError(f"--memory {text}: give a number and a unit, as in 24GB or 24GiB")
    return float(found[1]) * UNITS[found[2]]


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _place(one: Planned) -> str:
    return f"{_devices(one.run.devices)}, micro-batches of {one.rows} row{'s' if one.rows > 1 else ''}"


def _at_hand(settings: Settings, planned: Sequence[Planned], both: bool = False) -> list[Planned]:
    """Planned runs with the configuration's own devices, micro-batch and checkpointing, as far as there are such."""
    first = [one for one in planned if one.run.devices == planned[0].run.devices]
    known = {one.rows for one in first}
    wanted = settings.own_rows("ddp", planned[0].run.devices)
    rows = wanted if wanted in known else max(known)
    return [one for one in first if one.rows == rows and (both or one.run.checkpointing == settings.checkpointing)]


def _print_parts(settings: Settings, planned: Sequence[Planned]) -> None:
    shown = _at_hand(settings, planned)
    recomputed = "with" if settings.checkpointing else "without"
    print(parts_table(shown, f"GB a device, {_place(shown[0])}, {recomputed} checkpointing"))


def _print_totals(settings: Settings, planned: Sequence[Planned]) -> None:
    for count in dict.fromkeys(one.run.devices for one in planned):
        here = [one for one in planned if one.run.devices == count]
        columns = sorted({one.rows for one in here})
        cells = {one.run.strategy: {str(rows): "" for rows in columns} for one in here}
        for one in here:
            total = gigabytes(one.takes.peak)
            before = cells[one.run.strategy][str(one.rows)]
            cells[one.run.strategy][str(one.rows)] = f"{before} / {total}" if before else total
        print(grid_table(cells, f"GB a device, {_devices(count)}, by rows of a micro-batch: plain / checkpointed"))


def _largest(planned: Sequence[Planned], limits: dict[str, float]) -> list[dict[str, Any]]:
    """The largest micro-batch that fits, of those that are planned; 0 where none does."""
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


def _print_largest(fits: Sequence[dict[str, Any]], limits: dict[str, float]) -> None:
    for text in limits:
        cells: dict[str, dict[str, str]] = {}
        here = [fit for fit in fits if fit["memory"] == text]
        headings = [_devices(count) for count in dict.fromkeys(fit["devices"] for fit in here)]
        for fit in here:
            row = cells.setdefault(fit["strategy"], dict.fromkeys(headings, ""))
            row[_devices(fit["devices"])] = f"{fit['plain'] or '–'} / {fit['checkpointed'] or '–'}"
        print(grid_table(cells, f"Most rows of a micro-batch in {text}: plain / checkpointed"))
