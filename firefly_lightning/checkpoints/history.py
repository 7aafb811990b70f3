"""What a checkpoint tells people of the run that saved it: rows by kind, how losses went, what was reached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError

HISTORY = "RunHistory"
"""Key of the history among the states of callbacks in a checkpoint."""

MOST_POINTS = 1000
"""Points of a curve beyond which two become one; as many as a figure can show."""


class Curve:
    """A number that is logged at every step, thinned: each point is the mean of as many values as all others are.

    Attributes:
        points: By step, counted from 1, the mean of the values up to there.
    """

    def __init__(self) -> None:
        self.points: dict[int, float] = {}
        self._every, self._sum, self._count = 1, 0.0, 0

    def add(self, step: int, value: float) -> None:
        """Adds the value of a step; steps come in order."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._every:
            return
        self.points[step] = self._sum / self._count
        self._sum, self._count = 0.0, 0
        if len(self.points) >= MOST_POINTS:
            steps = list(self.points)
            pairs = zip(steps[::2], steps[1::2], strict=True)
            self.points = {last: (self.points[first] + self.points[last]) / 2 for first, last in pairs}
            self._every *= 2

    def state(self) -> list[Any]:
        """The curve in plain values."""
        return [self._every, self._sum, self._count, [list(point) for point in self.points.items()]]

    @classmethod
    def of(cls, state: Any) -> "Curve":
        """The curve that :meth:`state` gave."""
        curve = cls()
        every, total, count, points = state
        curve._every, curve._sum, curve._count = int(every), float(total), int(count)
        curve.points = {int(step): float(value) for step, value in points}
        return curve


class History:
    """What is told of a run.

    Attributes:
        base: Hub name of the model that it began with, or the name of its folder without the path to it.
        sources: Hub names of the datasets that were trained on, and names of files without their folders.
        kinds: By kind, the numbers of rows, of tokens and of learned tokens that were read.
        curves: By the name of a metric, how it went.
        figures: By the names of metrics, what the last validation found.
        figures_step: Step after which that was.
        figures_rows: By kind, the number of validated rows.
        versions: By the names of packages, their releases.
    """

    def __init__(self) -> None:
        self.base = ""
        self.sources: list[str] = []
        self.kinds: dict[str, dict[str, int]] = {}
        self.curves: dict[str, Curve] = {}
        self.figures: dict[str, float] = {}
        self.figures_step = 0
        self.figures_rows: dict[str, int] = {}
        self.versions: dict[str, str] = {}

    def state(self) -> dict[str, Any]:
        """The history in plain values."""
        return {**vars(self), "curves": {name: curve.state() for name, curve in self.curves.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "History":
        """The history that :meth:`state` gave.

        Raises:
            FireflyError: If it is something else.
        """
        history = cls()
        try:
            history.base = str(state["base"])
            history.sources = [str(name) for name in state["sources"]]
            history.kinds = {str(kind): _counts(numbers) for kind, numbers in state["kinds"].items()}
            history.curves = {str(name): Curve.of(curve) for name, curve in state["curves"].items()}
            history.figures = {str(name): float(value) for name, value in state["figures"].items()}
            history.figures_step, history.figures_rows = int(state["figures_step"]), _counts(state["figures_rows"])
            history.versions = {str(name): str(release) for name, release in state["versions"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FireflyError("the history of the run in the checkpoint cannot be read") from error
        return history


def without_folder(name: str) -> str:
    """The name of a file or folder without the path to it, which is nobody else's business; a hub name as it is."""
    return Path(name).name if Path(name).expanduser().exists() else name


def _counts(numbers: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): int(number) for name, number in numbers.items()}
