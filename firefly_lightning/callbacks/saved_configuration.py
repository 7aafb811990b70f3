"""The configuration of a run, kept beside its figures and in its checkpoints."""

import itertools
from functools import cached_property
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.callbacks.run_folder import run_folder
from firefly_lightning.callbacks.run_record import goes_on
from firefly_lightning.checkpoints.layout import CONFIGURATION_KEY
from firefly_lightning.checkpoints.saved_config import differences


class SavedConfiguration(SaveConfigCallback):
    """Writes the whole configuration beside the figures of a run, and into its checkpoints."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the folder of the run, which takes all processes; the first one then writes the configuration.

        A run that goes on in the folder of the one before it does so once it trains: until then it may be refused.
        """
        self._folder = run_folder(trainer)
        if not goes_on(trainer):
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the configuration of a run that goes on."""
        if goes_on(trainer) and trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the configuration, unless it would take the place of the user's own file.

        One that is there and says something else is kept under another name.
        """
        written = self._folder / self.config_filename
        if any(written.exists() and written.samefile(str(given)) for given in self.config.get("config") or ()):
            rank_zero_info(f"{written} is the configuration that was given, and stays as it is")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if written.exists() and differences(written.read_text("utf-8"), self._text):
            free = (written.with_stem(f"{written.stem}-{number}") for number in itertools.count())
            written.rename(next(path for path in free if not path.exists()))
        self.parser.save(self.config, str(written), skip_none=False, overwrite=True, multifile=self.multifile)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration to a checkpoint, as YAML."""
        checkpoint[CONFIGURATION_KEY] = self._text

    @cached_property
    def _text(self) -> str:
        """The configuration as YAML; made once, since that takes some tenths of a second."""
        return str(self.parser.dump(self.config, skip_none=False))
