"""The configuration of a run, kept beside its figures and in its checkpoints."""

from functools import cached_property
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.callbacks.run_folder import run_folder
from firefly_lightning.checkpoints.layout import CONFIGURATION_KEY


class SavedConfiguration(SaveConfigCallback):
    """Writes the whole configuration beside the figures of a run, and into its checkpoints."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the folder of the run, which takes all processes; the first one then writes the configuration."""
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the configuration, unless it would take the place of the user's own file."""
        written = self._folder / self.config_filename
        if any(written.exists() and written.samefile(str(given)) for given in self.config.get("config") or ()):
            rank_zero_info(f"{written} is the configuration that was given, and stays as it is")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(written), skip_none=False, overwrite=True, multifile=self.multifile)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration to a checkpoint, as YAML."""
        checkpoint[CONFIGURATION_KEY] = self._text

    @cached_property
    def _text(self) -> str:
        """The configuration as YAML; made once, since that takes some tenths of a second."""
        return str(self.parser.dump(self.config, skip_none=False))
