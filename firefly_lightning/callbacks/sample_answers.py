"""Answers to the same prompts at every validation, so that one can read how a model learns."""

from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from firefly_lightning.data.batches import MicroBatch, collate
from firefly_lightning.data.tokenized_rows import TokenizedRow
from firefly_lightning.evaluation.predictions import Prediction
from firefly_lightning.module import FireflyModule
from firefly_lightning.prompt import PromptEncoder

PROMPTS = (
    "请以“春天”为题写一首五言绝句。",
    "对联：上联是“海阔凭鱼跃”，请对出下联。",
    "房间很干净，服务也很热情。这条评论是好评还是差评？",
)


class Samples(Callback):
    """Shows answers to fixed prompts at every validation of a training, on the console and in TensorBoard.

    Answers are generated as ``predict`` generates them; sampling draws the same random numbers every time.

    Args:
        prompts: The prompts to answer; an empty list switches the answers off.
    """

    def __init__(self, prompts: Sequence[str] = PROMPTS) -> None:
        self.prompts = list(prompts)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers on every rank, since a split or sharded model needs all ranks; the first one shows the answers."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.prompts:
            return
        if isinstance(pl_module, FireflyModule):
            batch = trainer.strategy.batch_to_device(prompt_batch(pl_module.encoder, self.prompts))
            self._show(trainer, pl_module, trainer.strategy.predict_step(batch, 0))

    @rank_zero_only
    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule, answers: Sequence[Prediction]) -> None:
        step = trainer.global_step
        lines = [f"  {one['input']}\n    {one['generated']}" for one in answers]
        pl_module.print("\n".join([f"Answers at step {step}:", *lines]))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for at, one in enumerate(answers):
                    text = f"**{one['input']}**\n\n{one['generated']}"
                    logger.experiment.add_text(f"samples/{at}", text, step)


def prompt_batch(encoder: PromptEncoder, prompts: Sequence[str]) -> MicroBatch:
    """Prompts as a micro-batch of rows whose targets are empty."""
    encoded = encoder.encode([[(prompt, "")] for prompt in prompts])
    rows = [TokenizedRow(np.array(ids, np.int32), np.array(mask)) for ids, mask in encoded]
    numbers = torch.arange(len(rows))
    return {
        **collate(rows, encoder.pad_token_id),
        "rows": numbers,
        "kinds": torch.zeros_like(numbers),
        "asks": torch.ones_like(numbers, dtype=torch.bool),
        "step": 0,
        "step_rows": len(rows),
        "step_target_tokens": len(rows),
        "step_micro_batches": 1,
    }
