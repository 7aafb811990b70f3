"""The file of the answers that a run generates."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.callbacks.run_folder import run_folder
from firefly_lightning.data.protocol import batches_of
from firefly_lightning.evaluation.predictions import Prediction, PredictionFile


class PredictionWriter(Callback):
    """Writes what ``predict`` and ``test`` generate into ``predictions.jsonl``, in the order of the rows' files.

    The file is beside the other files of the run, or under ``trainer.default_root_dir`` where there is no logger, and
    appears when it is complete. A dry run writes nothing.
    """

    # This is no BasePredictionWriter, since that one of Lightning's requires Lightning's own sampler.
    def __init__(self) -> None:
        self._file: PredictionFile | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins this rank's part of the file."""
        self._begin(trainer, trainer.predict_dataloaders)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins this rank's part of the file."""
        self._begin(trainer, trainer.test_dataloaders)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the answers of a micro-batch."""
        if self._file:
            self._file.write(outputs)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the answers of a micro-batch, if the module gives any."""
        if self._file and isinstance(outputs, dict):
            self._file.write(outputs.get("predictions", ()))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the parts of all ranks."""
        self._end(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the parts of all ranks."""
        self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Removes this rank's part when a run ends early."""
        if self._file:
            self._file.discard()

    def _begin(self, trainer: L.Trainer, loader: Any) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper of the trainer
            self._file = PredictionFile(run_folder(trainer), trainer.global_rank, sources_of(loader))

    def _end(self, trainer: L.Trainer) -> None:
        if not self._file:
            return
        self._file.close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            self._file.join(trainer.world_size)
            rank_zero_info(f"Predictions are in {self._file.path}")


def sources_of(loader: Any) -> list[str]:
    """Names of the files and datasets of a loader's rows; none where the rows are not this project's."""
    batches = batches_of(loader)
    return [] if batches is None else list(batches.rows.names)
