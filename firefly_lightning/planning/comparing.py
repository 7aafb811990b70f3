"""Compares the memory that is predicted for a run with the memory that real steps take on this machine."""

import sys
from dataclasses import replace
from typing import Any

import torch

from firefly_lightning.errors import FireflyError
from firefly_lightning.planning.measuring import STEPS, measure_run
from firefly_lightning.planning.memory import estimate
from firefly_lightning.planning.request import Settings
from firefly_lightning.planning.run_config import devices_of, read_fit, strategy_of
from firefly_lightning.planning.runs import row_shares
from firefly_lightning.planning.tables import grid_table


def compare(
    settings: Settings, strategies: list[str] | None, devices: list[int] | None, sizes: list[int] | None
) -> list[dict[str, Any]]:
    """Trains a few steps of every combination, and prints predicted beside measured memory.

    Args:
        settings: The configuration, the model and the rows of the plan.
        strategies: Names of the strategies to train with; by default the one of the configuration.
        devices: Numbers of devices to train on; by default the one of the configuration.
        sizes: Rows of a micro-batch to train with; by default the number of the configuration.

    Returns:
        For each combination its names and numbers; memory in bytes, the difference as a share of what was measured.

    Raises:
        FireflyError: If there are no rows, or a run ends with an error.
    """
    if settings.rows is None:
        raise FireflyError("--measure trains: it needs --config with a model and rows that are here")
    measured = []
    for count in devices or [devices_of(settings.fit.trainer)]:
        for name in strategies or [strategy_of(settings.fit.trainer, count)]:
            for rows in sizes or [settings.own_rows(name, count)]:
                print(f"training {STEPS} steps: {name}, {count} device(s), {rows} row(s) at a time", file=sys.stderr)
                measured.append(_compare_one(settings, name, count, rows, own=strategies is None))
    shown = {
        f"{one['strategy']}, {one['devices']} × {one['micro_batch_size']}": {
            "predicted": f"{one['predicted'] / 1e6:,.0f}",
            "measured": f"{one['measured'] / 1e6:,.0f}",
            "difference": f"{one['difference']:+.1%}",
            "beside it": f"{one['base'] / 1e6:,.0f}",
        }
        for one in measured
    }
    print(
        grid_table(
            shown, "MB of a process: predicted, and measured beyond what libraries and data take", "devices × rows"
        )
    )
    return measured


def _compare_one(settings: Settings, strategy: str, devices: int, rows: int, own: bool) -> dict[str, Any]:
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    arguments: list[Any] = [*settings.arguments, *(["--trainer.accelerator", "cpu"] if on_cpu else [])]
    settings = replace(settings, fit=read_fit(arguments))
    predicted = foretold(settings, STEPS, strategy, devices, rows)
    arguments += [
        *([] if own else ["--trainer.strategy", strategy]),
        "--data.micro_batch_size", rows, "--trainer.precision", settings.precision, "--trainer.num_nodes", 1,
    ]  # fmt: skip
    ranks_held = measure_run(arguments, devices)
    worst = max(ranks_held, key=lambda held: held["peak"] - held["base"])
    growth = worst["peak"] - worst["base"]
    return {
        "strategy": strategy,
        "devices": devices,
        "micro_batch_size": rows,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "predicted": round(predicted),
        "measured": growth,
        "base": worst["base"],
        "difference": predicted / growth - 1,
    }


def foretold(settings: Settings, steps: int, strategy: str, devices: int, rows: int) -> float:
    """Bytes that a process is foretold to take in its first steps, beside libraries and data.

    Args:
        settings: The configuration, the model and the rows of the plan.
        steps: Number of optimizer steps.
        strategy: Short name of the strategy.
        devices: Number of devices.
        rows: Rows of a micro-batch.

    Raises:
        FireflyError: If the strategy cannot train the model like this.
    """
    assert settings.rows is not None
    ranks = row_shares(strategy, devices)
    load = settings.rows.of_steps(steps, ranks, rows)
    run = settings.run(strategy, devices, rows, settings.checkpointing, refuse=True, load=load)
    assert run is not None
    takes = estimate(replace(run, copies_saves=False))  # so few steps save nothing
    # On a CPU, the memory of device and host is the same.
    return takes.peak + (sum(takes.host.values()) if settings.device == "cpu" else 0.0)
