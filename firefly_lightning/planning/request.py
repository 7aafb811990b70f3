"""What is to be planned: a configuration, the sizes of its model, and its rows if they are on this machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError
from firefly_lightning.planning.memory import estimate
from firefly_lightning.planning.planned import Planned
from firefly_lightning.planning.run_config import devices_of, model_size, read_fit, trained_of
from firefly_lightning.planning.runs import Load, ModelSize, Run, Trained, check, row_shares
from firefly_lightning.planning.training_rows import TrainingRows, training_rows
from firefly_lightning.preference.datamodule import PreferenceDataModule

DEVICES = (1, 2, 4, 8)
"""Numbers of devices to plan for by default, beside the number of the configuration."""


@dataclass(frozen=True)
class Settings:
    """What is to be planned.

    Attributes:
        arguments: Arguments of ``firefly-fit fit`` that make the configuration.
        fit: The configuration.
        model: Sizes of the model.
        rows: Rows of the data; None if they are not on this machine.
        counts: Numbers of devices to plan for, the one of the configuration first.
        precision: Precision of all planned runs.
        trained: What of the model is trained in all planned runs.
    """

    arguments: list[str]
    fit: Any
    model: ModelSize
    rows: TrainingRows | None
    counts: list[int]
    precision: str
    trained: Trained = field(default_factory=Trained)

    @property
    def batch_size(self) -> int:
        """Rows of an optimizer step."""
        return int(self.fit.data.init_args.batch_size)

    @property
    def of_pairs(self) -> bool:
        """Whether rows are pairs, each of two rows of tokens."""
        module = locate(self.fit.data.class_path)
        return isinstance(module, type) and issubclass(module, PreferenceDataModule)

    @property
    def checkpointing(self) -> bool:
        """Whether the configuration recomputes activations."""
        return bool(self.fit.model.init_args.gradient_checkpointing)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Kind of device to plan for: a GPU, unless the configuration asks for a CPU."""
        return "cpu" if self.fit.trainer.accelerator == "cpu" else "cuda"

    def share(self, strategy: str, devices: int) -> int:
        """Rows of a step that one device works on at most; 0 where there are more devices than rows."""
        ranks = row_shares(strategy, devices)
        return 0 if self.batch_size < ranks else -(-self.batch_size // ranks)

    def sizes(self, strategy: str, devices: int, chosen: Sequence[int] | None) -> list[int]:
        """Micro-batch sizes up to a device's share of a step: those that were chosen, or else those that divide it."""
        share = self.share(strategy, devices)
        return [size for size in range(1, share + 1) if (share % size == 0 if chosen is None else size in chosen)]

    def own_rows(self, strategy: str, devices: int) -> int:
        """Micro-batch size of the configuration, or a device's whole share of a step where it has none."""
        return int(self.fit.data.init_args.micro_batch_size or self.share(strategy, devices))

    def run(
        self,
        strategy: str,
        devices: int,
        rows: int,
        checkpointing: bool,
        refuse: bool = False,
        load: Load | None = None,
    ) -> Run | None:
        """The run to plan, or None where the strategy cannot train the model like this.

        Args:
            strategy: Short name of the strategy.
            devices: Number of devices.
            rows: Rows of a micro-batch.
            checkpointing: Whether activations are recomputed.
            refuse: Whether to raise an error instead of returning None.
            load: Tokens of a micro-batch; by default those of the largest one.

        Raises:
            FireflyError: If the strategy cannot train the model like this and ``refuse`` is set.
        """
        share = self.share(strategy, devices) or rows
        length, each = int(self.fit.data.init_args.max_length), 2 if self.of_pairs else 1
        micro_batches, tokens = -(-share // rows), self.fit.data.init_args.get("micro_batch_tokens")
        if load is None and tokens and self.rows:
            load, micro_batches = self.rows.of_tokens(row_shares(strategy, devices), rows, tokens)
        elif load is None:
            load = self.rows.heaviest(rows) if self.rows else Load.full(each * rows, length)
        run = Run(
            self.model, strategy, devices, load, micro_batches, self.precision, checkpointing, self.device,
            self.trained, bool(self.fit.checkpoint.asynchronous),
        )  # fmt: skip
        try:
            check(run)
        except FireflyError:
            if refuse:
                raise
            return None
        return run

    def planned(self, strategy: str, devices: int, rows: int, checkpointing: bool) -> Planned | None:
        """A run and the memory it takes; None where the strategy cannot train the model like this."""
        run = self.run(strategy, devices, rows, checkpointing)
        return Planned(run, rows, estimate(run)) if run else None


def read_settings(
    configs: list[str],
    model: str | None,
    sizes: dict[str, int | None],
    precision: str | None,
    devices: list[int] | None,
) -> Settings:
    """Reads what is to be planned from a configuration, or its defaults, and the options of the command.

    Args:
        configs: YAML files of the configuration.
        model: Path of a model, to take in place of the configuration's.
        sizes: Sizes of a model by name; either all of them are given or none.
        precision: Precision to take in place of the configuration's.
        devices: Numbers of devices to plan for in place of the usual ones.

    Raises:
        FireflyError: If the model is not known, or a value is wrong.
    """
    described = _are_given(sizes)
    if not (described or configs or model):
        raise FireflyError("no model to plan; give --config FILE, --model FOLDER, or --vocab_size and the other sizes")
    arguments = [part for config in configs for part in ("--config", config)]
    if model or not configs:
        arguments += ["--model.path", model or "."]
    fit = read_fit(arguments)
    for name, number in [*sizes.items(), *(("devices", count) for count in devices or [])]:
        if number is not None and number < 1:
            raise FireflyError(f"--{name} is {number}; it must be at least 1")
    given = dict[str, Any](sizes)
    size = ModelSize(**given) if described else model_size(str(fit.model.init_args.path))
    first = devices_of(fit.trainer)
    counts = devices or sorted({*DEVICES, first}, key=lambda count: (count != first, count))
    rows = _rows_here(fit) if configs else None
    if fit.model.init_args.attention == "eager":
        print("model.attention eager: takes more than what follows, which is planned for sdpa")
    precision = precision or _precision(fit.trainer.precision)
    trained = trained_of(fit.model, size, precision)
    return Settings(arguments, fit, size, rows, counts, precision, trained)


def _are_given(sizes: dict[str, int | None]) -> bool:
    """Whether the sizes of a model are given.

    Raises:
        FireflyError: If only some of them are given.
    """
    missing = [name for name, size in sizes.items() if size is None]
    if missing and len(missing) < len(sizes):
        raise FireflyError(f"--{missing[0]} is missing; the sizes of a model are {', '.join(sizes)}")
    return not missing


def _rows_here(fit: Any) -> TrainingRows | None:
    """Rows of a run; if they are not on this machine, prints why and returns None."""
    try:
        named = fit.ckpt_path and Path(fit.ckpt_path).exists()  # not 'last', which a run finds when it starts
        return training_rows(fit.data, fit.trainer, str(find_checkpoint(fit.ckpt_path)) if named else None)
    except FireflyError as error:
        print(error)
        return None


def _precision(given: Any) -> str:
    """Lightning's full name of a precision, of which it also understands short forms."""
    return {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(str(given), str(given))


def sizes_line(settings: Settings) -> str:
    """A line with the number of the model's parameters and the precision."""
    return f"{settings.model.parameters:,} parameters, {settings.precision}"


def describe(settings: Settings) -> dict[str, Any]:
    """Prints what is known of model and data, and returns it for ``plan.json``."""
    print(f"model: {sizes_line(settings)}")
    about: dict[str, Any] = {"precision": settings.precision, "batch_size": settings.batch_size}
    if settings.rows is None:
        length = settings.fit.data.init_args.max_length
        named = "pairs: each is taken for two rows of" if settings.of_pairs else "rows: each is taken for"
        print(f"{named} {length} tokens, all of them learned")
        return about | {"epoch": None, "max_length": length}
    epoch, last, rows = settings.rows.counts(), settings.rows.last, "pairs" if settings.of_pairs else "rows"
    what = "an epoch" if settings.rows.epoch <= last else "of an epoch, the part that the run takes"
    print(
        f"{what}: {epoch['steps']:,} steps of {settings.batch_size} {rows}, {epoch['rows']:,} {rows}, "
        f"{epoch['tokens']:,} tokens, {epoch['target_tokens']:,} of them learned"
    )
    if last == math.inf:
        print("the run: without a last step; set trainer.max_steps or trainer.max_epochs")
        return about | {"epoch": epoch, "steps": None}
    print(f"the run: {int(last):,} steps, {last / settings.rows.epoch:,.2f} epochs")
    return about | {"epoch": epoch, "steps": int(last)}


def plan_all(settings: Settings, strategies: Sequence[str], sizes: Sequence[int] | None) -> list[Planned]:
    """Plans every combination of strategy, devices, micro-batch and checkpointing that is possible.

    Raises:
        FireflyError: If no combination is possible.
    """
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
