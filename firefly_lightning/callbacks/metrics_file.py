"""``metrics.csv``: written so that a kill at any moment costs no row, and gone on with by a run that is resumed."""

import csv
from collections.abc import Iterable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml

from firefly_lightning.files.atomic import whole_file

METRICS = "metrics.csv"
"""Name of the file in the folder of a run."""


class MetricsFile:
    """What Lightning's ``CSVLogger`` writes with, in place of its own writer, which removes the file that is there.

    A new column has the file written anew; the old or the new one is found at every moment.

    Args:
        log_dir: Folder of the run.

    Attributes:
        metrics: Rows that are not written yet.
    """

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.metrics: list[dict[str, Any]] = []
        self.hparams: dict[str, Any] = {}
        self._file = Path(log_dir) / METRICS

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Adds a row."""
        values = {name: getattr(value, "item", lambda value=value: value)() for name, value in metrics_dict.items()}
        self.metrics.append({**values, "step": len(self.metrics) if step is None else step})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Writes hyper-parameters of a module beside the metrics."""
        self.hparams.update(params)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        save_hparams_to_yaml(str(self._file.with_name("hparams.yaml")), self.hparams)

    def save(self) -> None:
        """Writes the rows that were added."""
        if not self.metrics:
            return
        columns = _columns(self._file)
        if new := {name for row in self.metrics for name in row}.difference(columns):
            write_rows(self._file, [*read_rows(self._file), *self.metrics], sorted({*columns, *new}))
        else:
            with self._file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns).writerows(self.metrics)
        self.metrics = []


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a file by column, without the last one where a kill has cut it; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(line for line in opened if line.endswith("\n")))


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Writes a file of rows, in place of the one that is there."""
    with whole_file(file) as opened:
        text = TextIOWrapper(opened, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        writer.writerows(rows)
        text.flush()
        text.detach()


def cut_rows(file: Path, step: int) -> None:
    """Removes the rows of steps that a resumed run makes again.

    Args:
        file: The file.
        step: The first of these steps, counted from 0.
    """
    rows = read_rows(file)
    kept = [row for row in rows if int(row["step"]) < step]
    if len(kept) < len(rows) or not _is_whole(file):
        write_rows(file, kept, _columns(file))


def _columns(file: Path) -> list[str]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        return next(csv.reader(opened), [])


def _is_whole(file: Path) -> bool:
    return not file.is_file() or file.read_bytes()[-1:] in (b"", b"\n")
