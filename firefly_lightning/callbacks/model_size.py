"""The size of a model in one line, as a training begins."""

from math import prod
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class ModelSize(ModelSummary):
    """Says how many parameters are trained, in place of Lightning's table of the modules in the ``LightningModule``."""

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says the size, with weights of 4 bits counted as many as they are: two lie in a byte."""
        states: Any = ((weight, getattr(weight, "quant_state", None)) for weight in pl_module.parameters())
        self._in_bytes = sum(prod(state.shape) - weight.numel() for weight, state in states if hasattr(state, "shape"))
        super().on_fit_start(trainer, pl_module)

    @override
    def summarize(  # type: ignore[override]  # names only what it shows, and knows the model
        self,
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *others: Any,
        **more: Any,
    ) -> None:
        trained = "all" if trainable_parameters == total_parameters else f"{trainable_parameters:,}"
        total_parameters += self._in_bytes
        rank_zero_info(f"model: {total_parameters:,} parameters, {trained} of them trained, {model_size:,.1f} MB")
