"""FireflyModule: a (pruned) Bloom that learns the targets of instruction rows."""

import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import BloomForCausalLM, get_cosine_schedule_with_warmup

from firefly_lightning.data.batches import MicroBatch, PlannedBatches
from firefly_lightning.data.prompt import prompt_format
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import (
    DESCRIPTION_KEY,
    check_same_model,
    check_sizes,
    describe,
    load_bloom,
    load_tokenizer,
)
from firefly_lightning.loss import target_cross_entropy
from firefly_lightning.metrics import TargetLoss
from firefly_lightning.progress import fit_loop_state

NAMED_ROWS = 32
"""Rows that a message about a bad step names; the published batch sizes are 16 and 8."""


class FireflyModule(L.LightningModule):
    """Trains a Bloom on the targets of instruction rows.

    The loss of an optimizer step is the sum over its target tokens divided by their number, over all ranks and
    micro-batches.

    Args:
        path: Folder or hub name of the Bloom to start from, with its tokenizer.
        learning_rate: Of AdamW, reached at the end of the warm-up.
        warmup_steps: Optimizer steps of linear warm-up before the cosine.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        optimizer: Replaces AdamW; its own arguments hold, ``learning_rate`` is not used.
        lr_scheduler: Replaces warm-up and cosine; stepped once an optimizer step.
    """

    def __init__(
        self,
        path: str,
        learning_rate: float = 3e-5,
        warmup_steps: int = 3000,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.path = path
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model: BloomForCausalLM = None  # until configure_model, where Lightning wants it to be built
        self.evaluation_loss = TargetLoss()
        self._micro_losses: list[Tensor] = []
        self._description: dict[str, Any] | None = None

    def configure_model(self) -> None:
        """Loads the weights; here rather than in the constructor, so that a strategy can shard them as they come.

        Raises:
            FireflyError: If the folder holds no Bloom, or its tokenizer is of another model.
        """
        if self.model is not None:
            return
        self.model = load_bloom(self.path, torch.get_default_dtype())
        self.model.train()  # from_pretrained leaves it in evaluation mode, and Lightning keeps that
        tokenizer, _ = self._tokenizer_and_prompt()
        check_sizes(self.model.config, tokenizer, self.path)
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states, (rows, length, hidden_size), of right-padded (rows, length) tokens."""
        hidden: Tensor = self.model.transformer(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return hidden

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """A micro-batch's part of the step's loss, scaled so that the mean over micro-batches and ranks is it."""
        loss = self._shared_step(batch) * (batch["step_micro_batches"] / batch["step_target_tokens"])
        self._micro_losses.append(loss.detach())
        return loss

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Adds a micro-batch to the mean over target tokens."""
        self._evaluation_step(batch)

    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Adds a micro-batch to the mean over target tokens."""
        self._evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val_loss`` and ``val_perplexity``, weighted by target tokens."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs ``test_loss`` and ``test_perplexity``, weighted by target tokens."""
        self._log_evaluation("test")

    def on_train_start(self) -> None:
        """Forgets what a run that was stopped in the middle of a step had gathered."""
        self._micro_losses.clear()

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        """Makes dropout a function of seed, step, micro-batch and rank, so that a resumed run draws the same.

        Raises:
            FireflyError: If the rows are not those of this step: nothing else would show it.
        """
        if self.automatic_optimization and batch["step"] != self.global_step:
            raise FireflyError(
                f"step {self.global_step} was given the rows of step {batch['step']}; "
                "resume with the data module that the checkpoint was saved with"
            )
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(hash((seed, self.global_step, batch_idx, self.global_rank)) % 2**63)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the loss of the step, the learning rate and the gradient's norm before clipping.

        Raises:
            FireflyError: If loss or gradient is not finite; before the weights are touched, naming the step's rows.
        """
        loss = self.trainer.strategy.reduce(torch.stack(self._micro_losses).mean(), reduce_op="mean")
        self._micro_losses.clear()
        grad_norm = self._grad_norm()
        # A gradient scaler skips steps whose gradients overflow; without one nothing else would stop them.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not torch.isfinite(loss if scaled else loss + grad_norm):
            raise FireflyError(self._describe_bad_step(float(loss), float(grad_norm)))
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))
        self.log("grad_norm", grad_norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up into a cosine that ends at the last step, unless replaced.

        Raises:
            FireflyError: If the run has no last step for the cosine to end at.
        """
        make_optimizer = self.optimizer or (lambda parameters: AdamW(parameters, self.learning_rate, weight_decay=0.0))
        optimizer = make_optimizer(self.parameters())
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else self._cosine(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds configuration, tokenizer and format, so that the checkpoint can be exported alone."""
        if self._description is None:  # the same at every save, and a tokenizer takes a moment to write out
            self._description = describe(self.model.config, *self._tokenizer_and_prompt())
        checkpoint[DESCRIPTION_KEY] = self._description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this model, and resumes at the step of the plan that comes next.

        Raises:
            FireflyError: If it is of another.
        """
        if self.model is not None:
            check_same_model(checkpoint, self.model.config, self.path)
        batches = getattr(getattr(self._trainer, "datamodule", None), "train", None)
        if isinstance(batches, PlannedBatches) and checkpoint["global_step"] and "loops" in checkpoint:
            state = fit_loop_state(
                checkpoint["global_step"], batches.plan.steps_per_epoch, batches.micro_batches_per_step
            )
            checkpoint["loops"]["fit_loop"].update(state)

    def _shared_step(self, batch: MicroBatch) -> Tensor:
        """Summed negative log-likelihood of a micro-batch's targets."""
        hidden = self(batch["input_ids"], batch["attention_mask"])
        return target_cross_entropy(hidden, self.model.lm_head, batch["target_positions"], batch["target_ids"])

    def _evaluation_step(self, batch: MicroBatch) -> None:
        self.evaluation_loss.update(self._shared_step(batch), len(batch["target_ids"]))

    def _log_evaluation(self, stage: str) -> None:
        loss = self.evaluation_loss.compute()
        self.evaluation_loss.reset()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_perplexity": loss.exp()}, prog_bar=True)

    def _grad_norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)

    def _cosine(self, optimizer: Optimizer) -> LambdaLR:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise FireflyError("the cosine needs a last step; set trainer.max_steps or trainer.max_epochs")
        schedule: LambdaLR = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, int(steps))
        return schedule

    def _tokenizer_and_prompt(self) -> tuple[Any, Any]:
        """Those of the data, or of the model's folder where the data is not ours."""
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(datamodule, "tokenizer") and hasattr(datamodule, "prompt"):
            return datamodule.tokenizer, datamodule.prompt
        return load_tokenizer(self.path), prompt_format("firefly")

    def _describe_bad_step(self, loss: float, grad_norm: float) -> str:
        describe_step = getattr(getattr(self.trainer, "datamodule", None), "describe_step", None)
        rows = describe_step(self.global_step) if describe_step else []
        shown = ", ".join(rows[:NAMED_ROWS]) + (f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else "")
        return (
            f"step {self.global_step}: loss {loss}, gradient norm {grad_norm}; the weights are still those before it. "
            f"Look at its rows, or lower the learning rate. Rows: {shown or 'not known'}"
        )
