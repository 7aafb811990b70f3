"""firefly-fit: LightningCLI with this project's module, data, checkpoints and loggers as defaults."""

import logging
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import rich
from jsonargparse import ArgumentParser, capture_parser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from firefly_lightning.callbacks.prediction_writer import PredictionWriter
from firefly_lightning.callbacks.progress_bar import RunProgressBar
from firefly_lightning.callbacks.run_report import Report
from firefly_lightning.callbacks.sample_answers import Samples
from firefly_lightning.callbacks.signals import EndOnSignals
from firefly_lightning.callbacks.throughput import Throughput
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.layout import CONFIGURATION_KEY
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.checkpoints.saved_config import differences, read_configuration
from firefly_lightning.cli_errors import OneLineErrors
from firefly_lightning.data.datamodule import FireflyDataModule
from firefly_lightning.errors import FireflyError, one_line_errors
from firefly_lightning.interrupts import ends_on_signals
from firefly_lightning.module import FireflyModule
from firefly_lightning.strategies.registration import load_classes


class _Parser(OneLineErrors, LightningArgumentParser):
    pass


class SavedConfiguration(SaveConfigCallback):
    """Writes the whole configuration beside the figures of a run, and into its checkpoints."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the configuration, unless it would take the place of the user's own file."""
        written = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename
        if any(written.exists() and written.samefile(str(given)) for given in self.config.get("config") or ()):
            self.save_to_log_dir = False
            rank_zero_info(f"{written} is the configuration that was given, and stays as it is")
        super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration to a checkpoint, as YAML."""
        checkpoint[CONFIGURATION_KEY] = self._text

    @cached_property
    def _text(self) -> str:
        """The configuration as YAML; made once, since that takes some tenths of a second."""
        return str(self.parser.dump(self.config, skip_none=False))


class FireflyCLI(LightningCLI):
    """LightningCLI whose model, data and trainer have defaults that fit each other."""

    def __init__(self, **kwargs: Any) -> None:
        load_classes()  # so that the classes are known by their last names, and listed in the help
        super().__init__(
            FireflyModule,
            FireflyDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # A run may be resumed into its own folder; its configuration is then written again.
            save_config_kwargs={"overwrite": True},
            save_config_callback=SavedConfiguration,
            trainer_defaults={"log_every_n_steps": 1, "callbacks": [Report(), PredictionWriter()]},
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

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint to resume from, and shows which settings have changed since, before loading anything."""
        config = self.config[self.subcommand]
        if self.subcommand in ("validate", "test"):  # Lightning lists names of kinds, and a kind may be called [/x]
            rich.reconfigure(markup=False, emoji=False)
        if config.get("ckpt_path"):
            folder = Path(config.checkpoint.dirpath or _checkpoints(config)) if config.ckpt_path == "last" else Path()
            config.ckpt_path = str(find_checkpoint(str(folder / config.ckpt_path)))
            if self.subcommand == "fit":
                now = self._parser(self.subcommand).dump(config, skip_none=False)
                if table := differences(read_configuration(Path(config.ckpt_path)), now):
                    rank_zero_info(table)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that logs to CSV and TensorBoard and saves checkpoints atomically, unless told otherwise."""
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = _loggers(config.default_root_dir)
        portable = self.config[self.subcommand].checkpoint.portable
        kwargs["plugins"] = _with_atomic_checkpoints(config.plugins, portable)
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            # Checkpoints lie beside, not inside, the logs of one run, so that the next run finds `last`.
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(_checkpoints(self.config[self.subcommand]))
        return trainer

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
        callbacks = [*callbacks, EndOnSignals()]
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
    with ends_on_signals("firefly-fit"), one_line_errors("firefly-fit", MisconfigurationException):
        FireflyCLI()


def _quiet_lightning() -> None:
    """Silences the messages that Lightning prints at every start and that no user can act on."""
    advertisement = "litlogger"
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: advertisement not in record.getMessage())
    for message in (
        ".*LeafSpec.* is deprecated",  # Lightning's own use of torch
        "Total length of `list` across ranks is zero",  # a run without validation rows
        "Checkpoint directory .* exists and is not empty",  # a resumed run; nothing there is overwritten
    ):
        warnings.filterwarnings("ignore", message)


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _checkpoints(config: Any) -> Path:
    return Path(config.trainer.default_root_dir or Path.cwd()) / "checkpoints"


def _loggers(root: str | None) -> list[Logger]:
    """A CSV logger, which writes after every step so that a killed run keeps its figures, and TensorBoard beside it."""
    csv = CSVLogger(root or str(Path.cwd()), flush_logs_every_n_steps=1)
    return [csv, TensorBoardLogger(csv.save_dir, csv.name, csv.version)]


def _with_atomic_checkpoints(plugins: Any, portable: bool) -> list[Any]:
    """The plugins and one that writes checkpoints, portable or not, unless the user has named such a plugin already."""
    plugins = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    named = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if named else [*plugins, AtomicCheckpointIO(portable)]
