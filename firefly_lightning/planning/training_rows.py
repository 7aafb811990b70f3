"""The real lengths of a run's rows, if the rows are on this machine."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc import locate
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from firefly_lightning.data.datamodule import FireflyDataModule
from firefly_lightning.data.division import division_of
from firefly_lightning.data.limits import count_steps, last_step
from firefly_lightning.data.plan import StepPlan
from firefly_lightning.data.sources.records import find_sources, is_file
from firefly_lightning.errors import FireflyError
from firefly_lightning.planning.runs import Load

STEPS_LOOKED_AT = 1000
"""Steps whose micro-batches are looked at, where how many rows they have depends on the rows."""


@dataclass(frozen=True)
class TrainingRows:
    """The real lengths of a run's rows.

    Attributes:
        plan: Says which rows make each step.
        epoch: Number of steps that count as an epoch, by the run's limits.
        last: Number of the run's last step; infinite where it has none.
        lengths: (rows,) Number of tokens of each row of the data.
        targets: (rows,) Number of learned tokens of each row of the data.
    """

    plan: StepPlan
    epoch: int
    last: float
    lengths: npt.NDArray[np.integer[Any]]
    targets: npt.NDArray[np.integer[Any]]

    def counts(self) -> dict[str, int]:
        """Numbers of steps, rows and tokens of the first epoch, or of the whole run where that ends before."""
        steps = int(min(self.epoch, self.last))
        taken = np.concatenate([self.plan.rows(step) for step in range(steps)])
        tokens, targets = (int(of[taken].sum(dtype=np.int64)) for of in (self.lengths, self.targets))
        return {"steps": steps, "rows": len(taken), "tokens": tokens, "target_tokens": targets}

    def heaviest(self, rows: int) -> Load:
        """An upper bound of any micro-batch of ``rows`` rows: the most tokens, and the most learned tokens."""
        lengths, targets = (of[:rows] for of in self._sorted)
        longest = int(lengths[0])
        return Load(int(lengths.sum()), longest * len(lengths), longest, int(targets.sum()))

    def of_steps(self, steps: int, world_size: int, rows: int) -> Load:
        """The micro-batch with most tokens in the first steps.

        Args:
            steps: Number of steps.
            world_size: Number of processes that share the rows of a step.
            rows: Rows of a micro-batch at most.
        """
        division = division_of(self.plan, world_size, rows, None, steps)
        ranks = (division.shared(self.plan.rows(step), self.lengths) for step in range(steps))
        batches = [batch for step in ranks for rank in step for batch in rank if len(batch)]
        return max(map(self._load, batches), key=lambda load: load.tokens)

    def of_tokens(self, world_size: int, rows: int, tokens: int) -> tuple[Load, int]:
        """The largest micro-batch under a limit of tokens, and the number of micro-batches of a step and process.

        Padding is that of the first steps.

        Args:
            world_size: Number of processes that share the rows of a step.
            rows: Rows of a micro-batch at most.
            tokens: Tokens of a micro-batch at most.
        """
        limits = world_size, rows, tokens
        if limits not in self._under_limits:  # strategies and devices share them, and each takes a look at many steps
            self._under_limits[limits] = self._look_at(*limits)
        return self._under_limits[limits]

    def _look_at(self, world_size: int, rows: int, tokens: int) -> tuple[Load, int]:
        steps = int(min(self.epoch, self.last, STEPS_LOOKED_AT))
        division = division_of(self.plan, world_size, rows, tokens, steps)
        shared = (division.shared(self.plan.rows(step), self.lengths) for step in range(steps))
        loads = [self._load(batch) for step in shared for rank in step for batch in rank if len(batch)]
        padded, targets = (max(getattr(load, name) for load in loads) for name in ("padded", "targets"))
        most = self.heaviest(rows)
        return Load(min(tokens, most.tokens), padded, most.longest, targets), division.micro_batches

    @cached_property
    def _under_limits(self) -> dict[tuple[int, int, int], tuple[Load, int]]:
        return {}

    def _load(self, rows: npt.NDArray[np.int64]) -> Load:
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        return Load(int(lengths.sum()), longest * len(rows), longest, int(self.targets[rows].sum()))

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]:
        """Tokens and learned tokens of the rows that training takes, each sorted from most to least."""
        taken = np.concatenate([source.rows for source in self.plan.sources])
        return np.sort(self.lengths[taken])[::-1], np.sort(self.targets[taken])[::-1]


def training_rows(data: Any, trainer: Any, checkpoint: str | None = None) -> TrainingRows:
    """Finds the lengths of a run's rows, tokenising them if the cache lacks them; fetches no datasets of the hub.

    Args:
        data: The part of the configuration that describes the data.
        trainer: The part of the configuration that describes the trainer, whose limits the run has.
        checkpoint: The checkpoint that the run begins with, if any, whose prompt format its rows have.

    Raises:
        FireflyError: If files or the tokenizer are missing, the data module is not one of this project, or the limits
            leave no step.
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
    made.checkpoint = checkpoint
    made.prepare_data()
    made.setup("fit")
    limits = _limits(trainer)
    count_steps(limits, made.train)
    plan, epoch, rows = made.train.plan, made.train.steps_per_epoch, made.train.rows
    return TrainingRows(plan, epoch, last_step(limits, epoch), rows.lengths, rows.target_tokens)


def _limits(trainer: Any) -> SimpleNamespace:
    """What counts the steps of a run, as Lightning's trainer has it with these settings."""
    overfits, debugs = trainer.overfit_batches, int(trainer.fast_dev_run)
    limit = debugs or overfits or (1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches)
    steps, epochs = (debugs, None) if debugs else (trainer.max_steps, trainer.max_epochs)
    return SimpleNamespace(limit_train_batches=limit, overfit_batches=overfits, max_steps=steps, max_epochs=epochs)
