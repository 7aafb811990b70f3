"""The metrics that a run has logged, and its figures: losses, the perplexity of each kind, and what became of pairs."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import LogFormatter

from firefly_lightning.callbacks.metrics_file import METRICS, read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.model.metric_names import of_kind, renamed
from firefly_lightning.preparation.figures import BLUE, RED, find_font, save_figure

GREY = "#8C8C8C"
KIND_PERPLEXITY = of_kind("val_perplexity", "")
PANELS, MOST_PANELS = 4, 60
"""Most panels beside one another, and in all: more would take minutes to draw, and nobody looks at them."""

Metrics = dict[str, dict[int, float]]
"""By the name of a column of ``metrics.csv``: its values by step."""


def read_metrics(log_dir: Path, prefix: str = "", before: bool = False) -> Metrics:
    """Metrics of a run from its ``metrics.csv``, and of the runs that it branched off from, up to where it did.

    Args:
        log_dir: Folder of the run. The runs before it are looked for in the files that :func:`keep_metrics` has
            left in it, and if it is a ``version_N``, in the versions before it.
        prefix: What its logger puts before the names of metrics.
        before: Whether to leave out the folder's own file, of a run that has not logged anything yet.
    """
    metrics: Metrics = {"train_loss": {}}
    for file in itertools.islice(_files(log_dir), int(before), None):
        first = min(metrics["train_loss"], default=None)
        for name, values in read_csv(file, prefix).items():
            earlier = {step: value for step, value in values.items() if first is None or step < first}
            metrics.setdefault(name, {}).update(earlier)
        if not min(metrics["train_loss"], default=0):
            break
    return metrics


def read_csv(path: Path, prefix: str = "") -> Metrics:
    """Metrics of one file; none where there is no file.

    Args:
        path: The file.
        prefix: What its logger puts before the names of metrics.
    """
    metrics: Metrics = {}
    for row in read_rows(path):
        step = int(row.pop("step"))
        for name, value in row.items():
            if value:
                metrics.setdefault(renamed(name.removeprefix(prefix)), {})[step] = float(value)
    return metrics


@rank_zero_only
def keep_metrics(log_dir: Path) -> None:
    """Renames the ``metrics.csv`` of an earlier run in the same folder, which this one does not go on with."""
    if (file := log_dir / METRICS).is_file():
        file.rename(log_dir / f"metrics-{_count_kept(log_dir)}.csv")


def _files(log_dir: Path) -> Iterator[Path]:
    """The metrics of a run and of those that it may have resumed, the newest first."""
    yield log_dir / METRICS
    yield from (log_dir / f"metrics-{at}.csv" for at in reversed(range(_count_kept(log_dir))))
    if numbered := re.fullmatch(r"version_(\d+)", log_dir.name):
        yield from (log_dir.with_name(f"version_{at}") / METRICS for at in reversed(range(int(numbered[1]))))


def _count_kept(log_dir: Path) -> int:
    return next(number for number in itertools.count() if not (log_dir / f"metrics-{number}.csv").exists())


def draw_losses(metrics: Metrics, path: Path) -> None:
    """Draws training and validation loss and the learning rate by step, counted from 1, as a PNG.

    The training loss is drawn as a running mean too, since steps of few rows vary much.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    steps, train = sorted(metrics["train_loss"]), metrics["train_loss"]
    window = max(1, len(steps) // 50)
    means = [
        sum(train[step] for step in steps[max(0, index - window + 1) : index + 1]) / min(window, index + 1)
        for index in range(len(steps))
    ]
    done = [step + 1 for step in steps]  # metrics.csv counts steps from 0
    axes.plot(done, [train[step] for step in steps], color=BLUE, alpha=0.25, label="training")
    axes.plot(done, means, color=BLUE, label=f"training, mean of {window} steps")
    if validated := metrics.get("val_loss"):
        axes.plot(*_by_step(validated), "o-", color=RED, label="validation")
    counted = "pair" if "train_reward_accuracy" in metrics else "target token"
    axes.set(xlabel="optimizer step", ylabel=f"loss per {counted} (nats)")
    if rates := metrics.get("lr"):
        right = axes.twinx()
        right.plot(*_by_step(rates), "--", color=GREY, linewidth=1)
        right.set_ylim(bottom=0)
        right.set_ylabel("learning rate", color=GREY)
        right.tick_params(colors=GREY)
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.plot([], [], "--", color=GREY, linewidth=1, label="learning rate")
    _finish(axes)
    axes.legend()
    figure.savefig(path, dpi=150)


PAIRS = {
    "share of pairs rewarded rightly": ("reward_accuracy",),
    "reward of chosen minus rejected": ("reward_margin",),
    "log-probability of answers (nats)": ("chosen_log_prob", "rejected_log_prob"),
}
"""What a panel of the figure of pairs shows, and the metrics in it."""


def draw_pairs(metrics: Metrics, path: Path) -> None:
    """Draws rewards and log-probabilities of a preference training by step as a PNG, a panel for each of ``PAIRS``."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(1, len(PAIRS)), PAIRS.items(), strict=True):
        for name, color in zip(names, (BLUE, GREY), strict=False):
            which = f"{name.partition('_')[0]}, " if len(names) > 1 else ""
            steps = metrics.get(f"train_{name}", {})
            axes.plot(*_by_step(steps), color=color, alpha=0.35)
            axes.plot(*_by_step(_running_mean(steps)), color=color, label=f"{which}training")
            if validated := metrics.get(f"val_{name}"):
                line = "o-" if color == BLUE else "s--"
                axes.plot(*_by_step(validated), line, color=RED, label=f"{which}validation")
        axes.set(xlabel="optimizer step", title=label)
        axes.title.set_fontsize(9)
        _finish(axes)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _running_mean(values: Mapping[int, float]) -> dict[int, float]:
    """Means of the values of the last fiftieth of all steps, up to each step."""
    steps = sorted(values)
    window = max(1, len(steps) // 50)
    before = [steps[max(0, index - window + 1) : index + 1] for index in range(len(steps))]
    return {step: sum(map(values.__getitem__, taken)) / len(taken) for step, taken in zip(steps, before, strict=True)}


def kind_perplexities(metrics: Metrics) -> Metrics:
    """Perplexities in validation, by kind and step."""
    return {name.removeprefix(KIND_PERPLEXITY): of for name, of in metrics.items() if name.startswith(KIND_PERPLEXITY)}


def draw_kinds(perplexities: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draws the perplexity of each kind by step, a panel a kind on one logarithmic scale, the highest at the end first.

    The lines of all other kinds are grey in every panel, so that a kind can be compared with them.
    """
    last = {kind: values[max(values)] for kind, values in perplexities.items() if values}
    kinds = sorted(last, key=lambda kind: (-last[kind], kind))
    shown, lines = kinds[:MOST_PANELS], [_points(perplexities[kind]) for kind in kinds]
    width = min(PANELS, len(shown))
    height = -(-len(shown) // width)
    figure = Figure(figsize=(max(5, 2.6 * width), 1 + 1.9 * height), layout="constrained")
    grid = figure.subplots(height, width, sharex=True, sharey=True, squeeze=False)
    font = _font("".join(shown))
    for at, axes in enumerate(grid.flat):
        if at >= len(shown):
            axes.set_axis_off()
            continue
        name = shown[at].replace("$", chr(92) + "$")  # a dollar sign would begin a formula
        axes.set_title(f"{name}  {last[shown[at]]:,.4g}", fontproperties=font, fontsize=9, loc="left")
        _draw_panel(axes, lines, at)
        axes.tick_params(which="both", labelsize=7, labelbottom=at + width >= len(shown))
    figure.supxlabel("optimizer step")
    more = f"; {len(kinds) - len(shown)} more kinds are in metrics.csv" if len(kinds) > len(shown) else ""
    figure.supylabel(f"validation perplexity, the last one beside the name{more}")
    save_figure(figure, path)


def _draw_panel(axes: Axes, lines: Sequence[Sequence[tuple[int, float]]], at: int) -> None:
    """Draws one line in colour before all others."""
    axes.add_collection(LineCollection(lines, colors=GREY, linewidths=0.5, alpha=0.4))
    axes.plot(*zip(*lines[at], strict=True), marker="o", markersize=3, color=BLUE)
    axes.set_yscale("log")
    for show in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        show(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.4)))
    _finish(axes)


def _by_step(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """Steps counted from 1, in order, and the value at each."""
    steps = sorted(values)
    return [step + 1 for step in steps], [values[step] for step in steps]


def _points(values: Mapping[int, float]) -> list[tuple[int, float]]:
    return list(zip(*_by_step(values), strict=True))


def _finish(axes: Axes) -> None:
    axes.grid(which="both", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _font(text: str) -> FontProperties | None:
    """A font that has the characters of a text, or None: a run that is done does not fail for want of a font."""
    try:
        return find_font(text)
    except FireflyError as error:
        rank_zero_warn(f"kinds.png: {error}".replace(", or name a font file with --font", ""))
        return None
