"""The size of a model in one line, as a training begins."""

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class ModelSize(ModelSummary):
    """Says how many parameters are trained, in place of Lightning's table of the modules in the ``LightningModule``."""

    @staticmethod
    @override
    def summarize(  # type: ignore[override]  # names only what it shows
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *others: Any,
        **more: Any,
    ) -> None:
        trained = "all" if trainable_parameters == total_parameters else f"{trainable_parameters:,}"
        rank_zero_info(f"model: {total_parameters:,} parameters, {trained} of them trained, {model_size:,.1f} MB")
