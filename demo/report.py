"""Prints the figures of one run of the demo as a table; fails if training did not teach anything.

``python -m demo.report FOLDER [--preference]``
"""

import argparse
import csv
import json
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from firefly_lightning.errors import FireflyError, one_line_errors

LEAST_IMPROVEMENT = 20
"""How many times lower the validation perplexity must be after training than before."""

LEAST_ACCURACY, LAST_STEPS = 0.75, 10
"""Share of the pairs of so many last steps of whose answers the right one must be rewarded more.

Validation pairs are shown only: 160 pairs teach a model of five million weights little of others."""


def report(folder: Path) -> None:
    """Prints the table of a run.

    Args:
        folder: Folder of the run of the demo.

    Raises:
        FireflyError: If validation perplexity is not at least 20 times lower than before training.
    """
    pruning = json.loads((folder / "bloom-zh" / "pruning.json").read_text("utf-8"))
    runs = sorted(
        (folder / "train" / "lightning_logs").glob("version_*"), key=lambda path: int(path.name.split("_")[1])
    )
    first, last = _values(runs[0], "train_loss")[0], _values(runs[-1], "train_loss")[-1]
    before, after = (_metric(folder / "train" / name, "val_perplexity") for name in ("before", "after"))
    table = Table(box=SIMPLE, show_header=False)
    for what in ("vocabulary", "parameters"):
        sizes = pruning[what]
        table.add_row(
            f"{what}, before and after pruning", f"{sizes['before']:,} → {sizes['after']:,} ({sizes['ratio']:.2%})"
        )
    table.add_row("loss, first and last step", f"{first:.3f} → {last:.3f}")
    table.add_row("validation perplexity", f"{before:,.0f} → {after:,.1f} ({before / after:,.0f} times lower)")
    table.add_row("target tokens per second", f"{_median(runs[-1], 'target_tokens_per_second'):,.0f}")
    table.add_row("loss curve", str(runs[-1] / "loss.png"))
    Console(width=120).print(table)
    if before < LEAST_IMPROVEMENT * after:
        raise FireflyError(f"{folder}: validation perplexity is not {LEAST_IMPROVEMENT} times lower after training")


def report_preference(folder: Path) -> None:
    """Prints the table of a run of the demo of preferences.

    Args:
        folder: Folder of the run of the demo.

    Raises:
        FireflyError: If too few of the last pairs that were learned are judged rightly.
    """
    root = folder / "preference"
    run = root / "lightning_logs" / "version_0"
    losses = _values(run, "train_loss")
    table = Table(box=SIMPLE, show_header=False)
    table.add_row("loss, first and last step", f"{losses[0]:.3f} → {losses[-1]:.3f}")
    for name in ("val_loss", "val_reward_accuracy", "val_reward_margin"):
        before, after = (_metric(root / part, name) for part in ("before", "after"))
        table.add_row(name.replace("_", " ").replace("val", "validation"), f"{before:.3f} → {after:.3f}")
    last = _values(run, "train_reward_accuracy")[-LAST_STEPS:]
    learned = sum(last) / len(last)
    table.add_row(f"reward accuracy of the last {LAST_STEPS} steps", f"{learned:.3f}")
    table.add_row("target tokens per second", f"{_median(run, 'target_tokens_per_second'):,.0f}")
    table.add_row("rewards by step", str(run / "pairs.png"))
    Console(width=120).print(table)
    if learned < LEAST_ACCURACY:
        raise FireflyError(f"{root}: fewer than {LEAST_ACCURACY:.0%} of the last pairs learned are judged rightly")


def _metric(root: Path, name: str) -> float:
    return _values(root / "lightning_logs" / "version_0", name)[-1]


def _median(run: Path, name: str) -> float:
    values = sorted(_values(run, name))
    return values[len(values) // 2]


def _values(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preference", action="store_true", help="of bin/demo-preference")
    arguments = parser.parse_args()
    with one_line_errors("demo"):
        (report_preference if arguments.preference else report)(arguments.folder)
