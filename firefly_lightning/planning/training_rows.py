"""Rows of a run by their real lengths, where they are on this machine."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import numpy.typing as npt

from firefly_lightning.data.datamodule import FireflyDataModule
from firefly_lightning.data.plan import StepPlan
from firefly_lightning.data.sources.records import find_sources, is_file
from firefly_lightning.errors import FireflyError
from firefly_lightning.planning.runs import Load


@dataclass(frozen=True)
class TrainingRows:
    """Rows of the first epoch, by their real lengths.

    Attributes:
        plan: Which rows make a step.
        lengths: (rows,) tokens of each row of the data.
        targets: (rows,) learned tokens of each row.
    """

    plan: StepPlan
    lengths: npt.NDArray[np.integer[Any]]
    targets: npt.NDArray[np.integer[Any]]

    def counts(self) -> dict[str, int]:
        """Steps, rows and tokens of the first epoch."""
        steps = self.plan.steps_per_epoch
        taken = np.concatenate([self.plan.rows(step) for step in range(steps)])
        tokens, targets = (int(of[taken].sum(dtype=np.int64)) for of in (self.lengths, self.targets))
        return {"steps": steps, "rows": len(taken), "tokens": tokens, "target_tokens": targets}

    def heaviest(self, rows: int) -> Load:
        """The most that any micro-batch of so many rows can be."""
        lengths, targets = (of[:rows] for of in self._sorted)
        longest = int(lengths[0])
        return Load(int(lengths.sum()), longest * len(lengths), longest, int(targets.sum()))

    def of_steps(self, steps: int, world_size: int, rows: int) -> Load:
        """The largest micro-batch of the first steps."""
        ranks = (self.plan.micro_batches(step, world_size, rows) for step in range(steps))
        batches = [batch for step in ranks for rank in step for batch in rank if len(batch)]
        return max(map(self._load, batches), key=lambda load: load.tokens)

    def _load(self, rows: npt.NDArray[np.int64]) -> Load:
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        return Load(int(lengths.sum()), longest * len(rows), longest, int(self.targets[rows].sum()))

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]:
        """Lengths and learned tokens of the rows that training takes, each from the most down."""
        taken = np.concatenate([source.rows for source in self.plan.sources])
        return np.sort(self.lengths[taken])[::-1], np.sort(self.targets[taken])[::-1]


def training_rows(data: Any) -> TrainingRows:
    """Rows of a run's data, tokenised if the cache lacks them; datasets of the hub are not fetched.

    Args:
        data: What the configuration says of the data.

    Raises:
        FireflyError: If files or the tokenizer are not there, or the rows are not those of this project's module.
    """
    options = dict(data.init_args)
    files = options.get("train_files") or []
    names = [item if isinstance(item, str) else item["path"] for item in ([files] if isinstance(files, str) else files)]
    if not names:
        raise FireflyError("data.train_files: no file is named")
    if missing := [source for source in find_sources(names) if not is_file(source)]:
        raise FireflyError(f"{missing[0]}: no file here, and datasets of the hub are not fetched for a plan")
    if not Path(str(options["tokenizer"])).is_dir():
        raise FireflyError(f"{options['tokenizer']}: no folder here with a tokenizer")
    module = locate(data.class_path)
    if not (isinstance(module, type) and issubclass(module, FireflyDataModule)):
        raise FireflyError(f"{data.class_path}: only rows of a FireflyDataModule can be counted")
    made: Any = module(**options)
    made.prepare_data()
    made.setup("fit")
    return TrainingRows(made.train.plan, made.train.rows.lengths, made.train.rows.target_tokens)
