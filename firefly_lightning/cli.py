"""firefly-fit: LightningCLI with this project's module, data, checkpoints and loggers as defaults."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, capture_parser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities import LightningEnum, rank_zero_info
from torch import OutOfMemoryError
from yaml import SafeDumper

from firefly_lightning.callbacks.catch_up import CatchUp
from firefly_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from firefly_lightning.callbacks.model_size import ModelSize
from firefly_lightning.callbacks.prediction_writer import PredictionWriter
from firefly_lightning.callbacks.progress_bar import RunProgressBar, spare_bars
from firefly_lightning.callbacks.run_folder import missing_folders, remove_unmeasured
from firefly_lightning.callbacks.run_history import RunHistory
from firefly_lightning.callbacks.run_loggers import csv_logger, default_loggers, go_on, take_files
from firefly_lightning.callbacks.run_record import RunRecord
from firefly_lightning.callbacks.run_report import Report
from firefly_lightning.callbacks.sample_answers import Samples
from firefly_lightning.callbacks.saved_configuration import SavedConfiguration
from firefly_lightning.callbacks.signals import EndOnSignals
from firefly_lightning.callbacks.start_checks import StartChecks
from firefly_lightning.callbacks.throughput import Throughput
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.layout import RUN_KEY
from firefly_lightning.checkpoints.newest import AUTO
from firefly_lightning.checkpoints.saved_config import differences, read_configuration
from firefly_lightning.checkpoints.start import Start, find_start
from firefly_lightning.cli_errors import (
    OneLineErrors,
    Refusals,
    alike_names,
    check_numbers,
    check_values,
    checkpoint_errors,
    refusals_of,
)
from firefly_lightning.data.datamodule import FireflyDataModule
from firefly_lightning.errors import FireflyError, one_line_errors
from firefly_lightning.interrupts import ends_on_signals
from firefly_lightning.module import FireflyModule
from firefly_lightning.preference.datamodule import PreferenceDataModule
from firefly_lightning.preference.module import PreferenceModule
from firefly_lightning.strategies.catalogue import BY_NAME
from firefly_lightning.strategies.registration import load_classes
from firefly_lightning.strategies.torchrun import take_places

BY_LAST_NAME = (FireflyModule, FireflyDataModule, PreferenceModule, PreferenceDataModule)
"""Classes that ``--model`` and ``--data`` take by their last names, since they are imported here."""


class _Parser(OneLineErrors, LightningArgumentParser):
    pass


class FireflyCLI(LightningCLI):
    """LightningCLI whose model, data and trainer have defaults that fit each other."""

    def __init__(self, **kwargs: Any) -> None:
        self._refusals = Refusals(MisconfigurationException)
        self._new_folders: list[Path] = []
        self._start, self._record = Start(), RunRecord()
        # The default of Lightning's Timer is one, which the saved configuration could not hold otherwise.
        SafeDumper.add_multi_representer(LightningEnum, lambda dumper, value: dumper.represent_str(value.value))
        load_classes()  # so that the classes are known by their last names, and listed in the help
        super().__init__(
            FireflyModule,
            FireflyDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # A run may be resumed into its own folder; its configuration is then written again.
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            save_config_callback=SavedConfiguration,
            trainer_defaults={"log_every_n_steps": 1, "callbacks": [Report(), PredictionWriter(), StartChecks()]},
            parser_class=_Parser,
            parser_kwargs={
                "predict": {"description": "Answers every row of data.predict_files; writes predictions.jsonl."}
            },
            auto_configure_optimizers=False,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands; ``predict`` has no flag to gather all predictions in memory: they go to a file."""
        known = LightningCLI.subcommands()
        return {**known, "predict": known["predict"] | {"return_predictions"}}

    def predict(self, **kwargs: Any) -> None:
        """Answers the rows of ``data.predict_files``: what ``firefly-fit predict`` runs."""
        self.trainer.predict(return_predictions=False, **kwargs)

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        """Runs ``firefly-fit validate``, which prints the table of its report, not Lightning's list of all digits."""
        self._report_prints(verbose)
        self.trainer.validate(verbose=False, **kwargs)

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Runs ``firefly-fit test``, which prints the table of its report, not Lightning's list of all digits."""
        self._report_prints(verbose)
        self.trainer.test(verbose=False, **kwargs)

    def _report_prints(self, prints: bool) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Report):
                callback.prints = prints

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the keys of throughput, samples and checkpoints, and gives the data the model's tokenizer."""
        parser.set_defaults(
            {"model": {"class_path": _path_of(FireflyModule)}, "data": {"class_path": _path_of(FireflyDataModule)}}
        )
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.link_arguments("model.init_args.path", "data.init_args.tokenizer")

    def _set_seed(self) -> None:
        """Sets the seed, once the numbers of the configuration are known to be in their ranges."""
        check_numbers(self.config[self.subcommand])
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint to resume from, and shows which settings have changed since, before loading anything."""
        config = self.config[self.subcommand]
        take_places(config.trainer)
        root, asked = Path(config.trainer.default_root_dir or Path.cwd()), config.get("ckpt_path")
        of_names = {"last": config.checkpoint, "best": config.best_checkpoint}
        folders = {name: Path(one.dirpath or root / "checkpoints") for name, one in of_names.items()}
        start = find_start(asked, str(self.subcommand), folders, root, config.best_checkpoint.mode)
        for line in start.lines:
            rank_zero_info(line)
        if asked not in (None, "hpc") and start.checkpoint:
            if asked != AUTO:  # which the saved configuration keeps
                config.ckpt_path = str(start.checkpoint)
            now = self._parser(self.subcommand).dump(config, skip_none=False)
            if self.subcommand == "fit" and (table := differences(read_configuration(start.checkpoint), now)):
                rank_zero_info(table)
        self._start = start

    def instantiate_classes(self) -> None:
        """Makes the objects of the configuration.

        Raises:
            FireflyError: If the constructor of one refuses its arguments.
        """
        try:
            super().instantiate_classes()
        except Exception:  # jsonargparse wraps it into many lines on all the types that it has tried
            if self._refusals.noted:
                raise self._refusals.noted from None
            raise

    def _add_instantiators(self) -> None:
        """Has every object be made by a function that knows what its constructor says, before jsonargparse wraps it."""
        super()._add_instantiators()
        for key, kind in (("model", FireflyModule), ("data", FireflyDataModule)):
            self.parser.add_instantiator(self._refusals.noting(_InstantiatorFn(self, key)), kind)
        self.parser.add_instantiator(self._refusals.noting(_make), object)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that logs to CSV and TensorBoard and saves checkpoints atomically, unless told otherwise.

        CSV is written beside other loggers too, since the report and the figures of a run are made of it.
        """
        self._refusals.noted = None
        config = self.config_init[self.subcommand].trainer
        given = config.logger if isinstance(config.logger, list) else [config.logger]
        if config.logger in (None, True):
            kwargs["logger"] = default_loggers(config.default_root_dir)
        elif config.logger is not False and not any(isinstance(logger, CSVLogger) for logger in given):
            kwargs["logger"] = [*given, csv_logger(config.default_root_dir)]
        portable = self.config[self.subcommand].checkpoint.portable
        kwargs["plugins"] = _with_atomic_checkpoints(config.plugins, portable)
        start, loggers = self._start, kwargs.get("logger", given)
        goes_on = start.same_run and go_on(loggers, start.saved, config.log_every_n_steps)
        self._record = RunRecord(start.checkpoint, start.saved.get(RUN_KEY), start.same_run, goes_on)
        trainer = super().instantiate_trainer(**kwargs)
        take_files(trainer, goes_on)
        for callback in trainer.checkpoint_callbacks:
            # Checkpoints lie beside, not inside, the logs of one run, so that the next run finds `last`.
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(config.default_root_dir or Path.cwd()) / "checkpoints")
        self._new_folders = missing_folders(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Tells the data which checkpoint is loaded: rows are put into its prompt format."""
        checkpoint = str(self._start.checkpoint) if self._start.checkpoint else None
        if self.config[self.subcommand].get("ckpt_path") == AUTO:
            self.config_init[self.subcommand].ckpt_path = checkpoint
        if isinstance(self.datamodule, FireflyDataModule):
            self.datamodule.checkpoint = checkpoint

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the subcommand; where it fails before it has measured anything, it leaves no folder of figures."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            remove_unmeasured(self._new_folders)
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        """Makes the trainer, with this project's progress bar, and without its checkpoints where none are to be saved.

        Raises:
            FireflyError: If arguments of the trainer do not go together.
        """
        if config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        own = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        if config["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in own):
            callbacks = [*callbacks, RunProgressBar()]
        if config["enable_model_summary"] is not False and not any(isinstance(one, ModelSummary) for one in own):
            config["enable_model_summary"] = False
            callbacks = [*callbacks, ModelSize()]
        callbacks = [*callbacks, EndOnSignals(), self._record, CatchUp(), RunHistory()]
        _check_strategy(config["strategy"])
        try:
            return super()._instantiate_trainer(config, callbacks)
        except ValueError as error:  # what Lightning says of arguments that do not go together
            raise FireflyError(str(error)) from error

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration alone: Lightning would let the checkpoint's arguments win over the command line."""


def make_parser() -> ArgumentParser:
    """The parser of ``firefly-fit``, for reading a command line without building model, data and trainer."""
    return capture_parser(FireflyCLI)


def main() -> None:
    """Entry point of ``firefly-fit``."""
    _quiet_lightning()
    with (
        ends_on_signals("firefly-fit"),
        one_line_errors("firefly-fit", MisconfigurationException),
        refusals_of(Path(L.__file__).parent),
        checkpoint_errors(Path(checkpoint_connector.__file__), MisconfigurationException, OutOfMemoryError),
    ):
        check_values(sys.argv[1:])
        FireflyCLI()


def _quiet_lightning() -> None:
    """Silences the messages that Lightning prints at every start and that no user can act on."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "litlogger" not in record.getMessage())  # an advertisement
    spare_bars("lightning.pytorch", "lightning.fabric")
    for message in (
        ".*LeafSpec.* is deprecated",  # Lightning's own use of torch
        "Precision .* is not supported by the model summary",  # whose sizes are those of float32, as masters are
        "Total length of `list` across ranks is zero",  # a run without validation rows
        "`loftq_config` specified but will be ignored",  # a default, which jsonargparse writes out
        "\\s*Dump of a value that does not round-trip",  # what is wrong with it is said in a line
        "Checkpoint directory .* exists and is not empty",  # a resumed run; nothing there is overwritten
    ):
        warnings.filterwarnings("ignore", message)


def _make(kind: type, *args: Any, applied_instantiation_links: Any = None, **kwargs: Any) -> Any:
    return kind(*args, **kwargs)


def _check_strategy(name: Any) -> None:
    known = [*StrategyRegistry.available_strategies(), "auto"]
    if isinstance(name, str) and name not in known:
        near = alike_names(name.replace("_", ""), [*BY_NAME]) or alike_names(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(BY_NAME)}"
        raise FireflyError(f"trainer.strategy {name}: no such strategy; {hint}")


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _with_atomic_checkpoints(plugins: Any, portable: bool) -> list[Any]:
    """The plugins and one that writes checkpoints, portable or not, unless the user has named such a plugin already."""
    plugins = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    named = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if named else [*plugins, AtomicCheckpointIO(portable)]
