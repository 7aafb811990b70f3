"""FireflyModule: a (pruned) Bloom that learns the targets of instruction rows.

Longer than 300 lines, since all hooks of a run are read together.
"""

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import BloomForCausalLM, GenerationConfig

from firefly_lightning.checkpoints.contents import check_goes_on
from firefly_lightning.checkpoints.layout import ADAPTER_KEY, DESCRIPTION_KEY, REFERENCE_KEY, SETTINGS_KEY
from firefly_lightning.checkpoints.loop_state import set_progress
from firefly_lightning.checkpoints.unsharded import accept_names, keep_states, name_states, saved_parameters
from firefly_lightning.data.batches import MicroBatch, data_parallel_share
from firefly_lightning.data.prompt_choice import check_same_format, tokenizer_and_format
from firefly_lightning.data.protocol import data_of
from firefly_lightning.errors import FireflyError, check_number
from firefly_lightning.evaluation.generation import Decoding, change_decoding, default_decoding
from firefly_lightning.evaluation.mlflow_names import keep_names
from firefly_lightning.evaluation.predictions import Prediction, Predictor, predict
from firefly_lightning.evaluation.token_choice import TokenChoice
from firefly_lightning.evaluation.totals import ALL, EvaluationTotals, kinds_of
from firefly_lightning.huggingface import (
    PUBLISHED_DECODING,
    Quantize,
    check_same_model,
    check_sizes,
    describe,
    load_config,
)
from firefly_lightning.model.adapters import Lora
from firefly_lightning.model.fast_bloom import FastBloom, takes_fast_pass
from firefly_lightning.model.neftune import Neftune
from firefly_lightning.model.source import ModelSource, autocast_dtype
from firefly_lightning.model.stock_pass import StockPass
from firefly_lightning.optim import RunSettings, cosine_schedule
from firefly_lightning.prompt import PromptEncoder
from firefly_lightning.strategies.hooks import StrategyHooks, hooks_of
from firefly_lightning.strategies.run_optimizer import check_optimizer, make_optimizer
from firefly_lightning.strategies.step_guard import StepGuard
from firefly_lightning.strategies.unsuited_callbacks import check_callbacks


class Summed(NamedTuple):
    """What a micro-batch adds to the loss of its step.

    Attributes:
        loss: Sum of the losses of what is counted, a scalar.
        counted: Number of what is counted in the whole step, over all its micro-batches and ranks.
        figures: Further sums by name; their means over the step are logged as ``train_NAME``.
    """

    loss: Tensor
    counted: int
    figures: Mapping[str, Tensor] = {}


class FireflyModule(L.LightningModule):
    """Trains a Bloom on the targets of instruction rows.

    The loss of an optimizer step is the sum over its target tokens divided by their number, over all ranks and
    micro-batches.

    Args:
        path: Folder or hub name of the Bloom to start from, with its tokenizer.
        learning_rate: Highest learning rate of AdamW, reached at the end of the warm-up.
        warmup_steps: Optimizer steps in which the learning rate rises linearly, before it falls along a cosine.
        attention: Forward pass to use: ``sdpa`` is the fast one of :mod:`firefly_lightning.model.fast_bloom`, ``eager``
            is Hugging Face's own, and ``auto`` means ``sdpa`` where it computes the same: not with ``slow_but_exact``.
        gradient_checkpointing: Whether activations are recomputed in the backward pass instead of kept.
        from_scratch: Whether to begin with random weights for the folder's ``config.json``, not the folder's weights.
        optimizer: Optimizer that replaces AdamW; its own arguments hold, and ``learning_rate`` is not used.
        lr_scheduler: Schedule that replaces warm-up and cosine; it is stepped once an optimizer step.
        weight_decay: Weight decay of matrices and embeddings, not of biases and layer norms; it also holds for an
            ``optimizer`` that replaces AdamW.
        loraplus_lr_ratio: By how much the learning rate of an adapter's matrices B is higher than that of A (LoRA+).
        release_gradients: Whether each weight is updated as its gradient arrives, so that gradients are not in memory
            together: on one device, where a step is one micro-batch and nothing clips gradients.
        decoding: Settings with which ``test`` and ``predict`` answer, where they differ from the model's own generation
            config, such as ``{max_new_tokens: 100, do_sample: false}``.
        adapter: Adapter that is trained in the place of all weights: ``lora``, its ``{rank, alpha, dropout,
            target_modules}``, or any of peft as ``class_path: peft.LoraConfig`` with its ``init_args``.
        quantize: How the frozen weights under an adapter are kept: ``nf4`` in 4 bits, ``int8`` in 8; as they are where
            not given.
        neftune_noise_alpha: Strength of the noise that NEFTune adds to the embeddings of training rows; 0 for none.

    Attributes:
        totals: Class that adds up the metrics of an evaluation; that of a subclass may be another.
        shown_metrics: Names of those that the progress bar shows.
        has_reference: Whether the loss compares the model with a reference, whose figures are then in checkpoints.
    """

    totals: type[EvaluationTotals] = EvaluationTotals
    shown_metrics: tuple[str, ...] = ("loss", "perplexity")
    has_reference = False

    def __init__(
        self,
        path: str,
        learning_rate: float = 3e-5,
        warmup_steps: int = 3000,
        attention: Literal["auto", "sdpa", "eager"] = "auto",
        gradient_checkpointing: bool = False,
        from_scratch: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float = 0.0,
        loraplus_lr_ratio: float | None = None,
        release_gradients: bool = False,
        decoding: Decoding | None = None,
        adapter: Literal["lora"] | Lora | Any = None,
        quantize: Quantize | None = None,
        neftune_noise_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "adapter"])
        check_number("model.learning_rate", learning_rate, least=0)
        check_number("model.warmup_steps", warmup_steps, least=0)
        check_number("model.neftune_noise_alpha", neftune_noise_alpha, least=0)
        check_number("model.weight_decay", weight_decay, least=0)
        check_number("model.loraplus_lr_ratio", loraplus_lr_ratio, above=0)
        self.path = path
        self._source = ModelSource(path, from_scratch, adapter, quantize)
        self.adapter = self._source.adapter
        self.saves_trained_only = self.adapter is not None
        self.strict_loading = not self.saves_trained_only
        self._noise = Neftune(neftune_noise_alpha)
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.weight_decay, self.loraplus_lr_ratio = weight_decay, loraplus_lr_ratio
        self.release_gradients = release_gradients
        self.decoding = decoding or Decoding()
        self.model: BloomForCausalLM = None  # until configure_model, where Lightning wants it to be built
        self._pass: FastBloom | StockPass = StockPass(self)
        self._predictor: Predictor | None = None
        self._totals: EvaluationTotals  # totals of one evaluation, set when it starts
        self.step_guard = StepGuard()
        self._description: dict[str, Any] | None = None
        self._settings = RunSettings()

    def configure_callbacks(self) -> list[Callback]:
        """Adds none, and refuses what cannot be used of model, adapter and callbacks, before rows are read.

        Raises:
            FireflyError: If the folder holds no whole Bloom, the adapter does not fit it, or there is such a callback.
        """
        self._source.check()
        check_callbacks(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Refuses a model, an optimizer or decoding settings that cannot be used, before weights are loaded.

        Raises:
            FireflyError: If one of them cannot be used.
        """
        config = load_config(self.path)
        if self.saves_trained_only:
            self._hooks.check_adapter(quantized=self._source.quantize is not None)
            self._source.note_base(self.trainer.strategy.broadcast, self.trainer.is_global_zero)
        if begins_with := getattr(data_of(self.trainer), "checkpoint", None):
            self._source.check_checkpoint(begins_with)
        self._hooks.check_model(config)
        takes_fast_pass(self.attention, config)
        change_decoding(GenerationConfig(**PUBLISHED_DECODING), self.decoding)
        self.encoder = PromptEncoder(*self._tokenizer_and_prompt())
        keep_names(self.trainer.loggers)
        if stage == "fit":
            self._settings = RunSettings()
            check_optimizer(self)

    def configure_model(self) -> None:
        """Loads the weights; here rather than in the constructor, so that a strategy can shard them as they come.

        Raises:
            FireflyError: If the folder holds no Bloom, or its tokenizer is of another model.
        """
        if self.model is not None:
            return
        dtype, casts = torch.get_default_dtype(), autocast_dtype(self.trainer.precision) if self._trainer else None
        build = partial(self._source.load, dtype, casts or dtype)
        kept_in = None if isinstance(self._hooks, Strategy) else casts
        self.model = self._hooks.build_model(
            load_config(self.path), build, partial(self._source.put_adapter, kept_in=kept_in)
        )
        self.model.train()  # from_pretrained leaves it in evaluation mode, and Lightning keeps that
        self._noise.attach(self.model)
        check_sizes(self.model.config, self._tokenizer_and_prompt()[0], self.path)
        if takes_fast_pass(self.attention, self.model.config):
            heads = self._hooks.own_heads(self.model.config.n_head)
            self._pass = FastBloom(self.model, heads, self._hooks.whole_weights)
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states, (rows, length, hidden_size), of right-padded (rows, length) tokens."""
        return self.model.transformer(input_ids, attention_mask=attention_mask, use_cache=False)[0]  # type: ignore[no-any-return]

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """A micro-batch's loss, scaled so that the mean over micro-batches and ranks is the loss of the step."""
        with self._noise.on(self.computed_lengths(batch)):
            summed = self.summed_loss(batch)
        scale = batch["step_micro_batches"] / summed.counted
        loss = summed.loss * scale
        self.step_guard.add(self, loss, {name: figure * scale for name, figure in summed.figures.items()})
        return loss

    def summed_loss(self, batch: MicroBatch) -> Summed:
        """The loss of a micro-batch, and the number that it is divided by.

        A subclass that learns something else says so here: the strategy, the sums over micro-batches and ranks, and the
        checks of every step are the same for every loss.
        """
        return Summed(self.forward_pass.target_loss(batch), batch["step_target_tokens"])

    def computed_lengths(self, batch: MicroBatch) -> list[int]:
        """Number of tokens of each row as the model computes it."""
        return batch["lengths"]

    def initial_weights(self) -> str | None:
        """What identifies the weights that the run begins with, without an adapter; None where they are random.

        All processes call this together; the first one reads the weights' files.
        """
        return self._source.identity(self.trainer.strategy.broadcast, self.trainer.is_global_zero)

    @property
    def forward_pass(self) -> FastBloom | StockPass:
        """What computes the model on a micro-batch: the fast pass or Hugging Face's own."""
        return self._pass

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Adds a micro-batch to the metrics."""
        self.add_to_totals(batch, self._totals)

    def test_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        """Adds a micro-batch to the metrics, with answers as ``predict_step`` gives them if its kinds are known."""
        self.add_to_totals(batch, self._totals)
        if self._totals.kinds is None:
            return {"predictions": []}
        more = _more_follow(self.trainer.num_test_batches, batch_idx)
        predictions = self._answers(self.asked(batch), self._totals.kinds, last=not more)
        self._totals.add_answers(predictions)
        return {"predictions": predictions}

    def predict_step(self, batch: MicroBatch, batch_idx: int) -> list[Prediction]:
        """Answers to the first input of rows of this and earlier micro-batches, all of them with the last one.

        Sampled answers depend on seed and row alone; where a strategy shards the model or Hugging Face's own pass
        generates, on seed, micro-batch and rank.
        """
        more = self.trainer.predicting and _more_follow(self.trainer.num_predict_batches, batch_idx)
        return self._answers(batch, kinds_of(self.trainer.predict_dataloaders), last=not more)

    def on_validation_epoch_start(self) -> None:
        """Starts new totals for a validation."""
        self._totals = self.totals(self.trainer.val_dataloaders, self.device)

    def on_predict_epoch_start(self) -> None:
        """Forgets rows of a prediction that ended early."""
        self._predictor = None

    def on_test_epoch_start(self) -> None:
        """Starts new totals for a test."""
        self._predictor = None
        self._totals = self.totals(self.trainer.test_dataloaders, self.device)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val_loss``; and over all and by kind ``val_perplexity``, ``val_accuracy`` and ``val_eos_accuracy``."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of a validation as ``test_…``, and the answers' scores: ``test_bleu_of/Couplet``."""
        self._log_evaluation("test")
        self.log_dict({f"test_{name}": score for name, score in self._totals.answer_scores().items()})

    def on_fit_start(self) -> None:
        """Notes the configured optimizer settings, and lets optimizers load states by name, before any are loaded."""
        for optimizer in self.trainer.optimizers if self._hooks.whole_states else ():
            accept_names(self, optimizer)
        self._settings.note(self.trainer)

    def on_train_start(self) -> None:
        """Forgets the losses of a step that was not finished, and restores the configured settings in a resumed run."""
        self.step_guard.forget()
        self._settings.restore(self.trainer)

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
        torch.manual_seed(self._seed(self.global_step, batch_idx))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the loss of the step, the learning rate and the gradient's norm before clipping.

        Raises:
            FireflyError: If loss or gradient is not finite; before the weights are touched, naming the step's rows.
        """
        self.step_guard.before_step(self, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        """Logs the gradient's norm where the engine has computed it in its step.

        Raises:
            FireflyError: If the norm is not finite.
        """
        self.step_guard.after_micro_batch(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up into a cosine that ends at the last step, unless replaced.

        Raises:
            FireflyError: If the run has no last step for the cosine to end at.
        """
        optimizer = make_optimizer(self)
        if self.lr_scheduler:
            schedule: Any = self.lr_scheduler(optimizer)
        else:
            schedule = cosine_schedule(optimizer, self.warmup_steps, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's configuration, tokenizer and prompt format, so that the checkpoint can be exported alone."""
        if self._description is None:  # the same at every save, and a tokenizer takes a moment to write out
            self._description = describe(self.model.config, *self._tokenizer_and_prompt())
        checkpoint[DESCRIPTION_KEY] = self._description
        if record := self._source.record():
            checkpoint[ADAPTER_KEY] = record
            kept = {name for name, _ in saved_parameters(self)}
            checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint[SETTINGS_KEY] = self._settings.changed(self.trainer)
        keep_states(checkpoint, self, self.trainer.optimizers, self._hooks.whole_states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this model, and resumes at the step of the plan that comes next.

        Raises:
            FireflyError: If the checkpoint is of another model or prompt format, or a training cannot go on from it.
        """
        check_goes_on(checkpoint, self._trainer)
        if REFERENCE_KEY in checkpoint and not self.has_reference and self._trainer and self._trainer.state.fn == "fit":
            raise FireflyError(
                f"{self._trainer.ckpt_path}: was saved by a training of preferences; to train its model on targets or "
                "texts, write a folder with firefly export and name that as model.path"
            )
        self._settings.resume(checkpoint.get(SETTINGS_KEY, []), checkpoint.get("lr_schedulers", []))
        name_states(checkpoint)
        if self.model is not None:
            check_same_model(checkpoint.get(DESCRIPTION_KEY, {}), self.model.config, self.path)
            self._source.check_record(checkpoint.get(ADAPTER_KEY))
        check_same_format(checkpoint.get(DESCRIPTION_KEY), self._trainer)
        set_progress(checkpoint, getattr(data_of(self._trainer), "train", None))

    def add_to_totals(self, batch: MicroBatch, totals: Any) -> None:
        """Adds a micro-batch to the totals of an evaluation, which are of the class ``totals``."""
        totals.add_targets(batch, self.forward_pass.target_scores(batch), self.encoder.eos_token_id)

    def asked(self, batch: MicroBatch) -> MicroBatch:
        """The rows of a micro-batch of a test that are answered."""
        return batch

    def _log_evaluation(self, stage: str) -> None:
        metrics = self._totals.target_metrics()
        shown = {f"{stage}_{name}": metrics.pop(name) for name in self.shown_metrics if name in metrics}
        self.log_dict(shown, prog_bar=True)
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.items()})

    def _answers(self, batch: MicroBatch, kinds: list[str] | None, last: bool) -> list[Prediction]:
        config = change_decoding(default_decoding(self.model), self.decoding)
        choice = TokenChoice.of(config)
        if isinstance(self._pass, FastBloom) and self._hooks.whole_weights and choice:
            predictor = self._predictor or Predictor(self._pass, self.encoder, choice, self._row_seed)
            self._predictor = None if last else predictor
            return predictor.answer(batch, kinds or [ALL], last)
        in_step = self._hooks.generates_in_step and self.trainer.world_size > 1
        return predict(self.model, self.encoder, batch, kinds or [ALL], config, self._seed(batch["step"]), in_step)

    @property
    def _hooks(self) -> StrategyHooks:
        return hooks_of(getattr(self._trainer, "strategy", None))

    def _seed(self, *where: int) -> int:
        """Random seed of a place in the run; it differs between ranks, except between those that split one model."""
        _, rank = data_parallel_share(self.trainer.strategy)
        return self._row_seed(*where, rank)

    def _row_seed(self, *where: int) -> int:
        """Random seed of something that is the same on every rank."""
        return hash((int(os.environ.get("PL_GLOBAL_SEED", 0)), *where)) % 2**63

    def _tokenizer_and_prompt(self) -> tuple[Any, Any]:
        """The data's tokenizer and prompt format; where it is not ours, the model's own."""
        data = data_of(self._trainer)
        return (data.tokenizer, data.prompt) if data else tokenizer_and_format(self.path)


def _more_follow(batches: Sequence[int | float], batch_idx: int) -> bool:
    """Whether micro-batches follow one in a loader of known length."""
    return len(batches) == 1 and batch_idx + 1 < batches[0] < math.inf
