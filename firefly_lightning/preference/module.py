"""PreferenceModule: a Bloom that learns which of two answers to a prompt is better."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from firefly_lightning.checkpoints.layout import REFERENCE_KEY
from firefly_lightning.data.batches import MicroBatch
from firefly_lightning.data.protocol import batches_of, data_of
from firefly_lightning.errors import FireflyError, check_number
from firefly_lightning.model.adapters import without_adapter
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.module import FireflyModule, Summed
from firefly_lightning.preference.metrics import PairTotals
from firefly_lightning.preference.objective import (
    AnswerLogProbs,
    PairScores,
    PreferenceLoss,
    answer_log_probs,
    figures_of,
    pair_scores,
)
from firefly_lightning.preference.pairs import PairBatch, PlannedPairs, chosen_rows, shared_prompts
from firefly_lightning.preference.reference import (
    Compute,
    ReferenceCache,
    ReferenceLogProbs,
    computed_by,
    ensure_reference,
)
from firefly_lightning.strategies.hooks import hooks_of


class PreferenceModule(FireflyModule):
    """Trains a Bloom on pairs of a chosen and a rejected answer, by DPO or IPO.

    The loss of an optimizer step is the mean over its pairs, over all ranks and micro-batches. The reference is the
    model before the first step; with an adapter it is the base.

    Args:
        args: Arguments of :class:`FireflyModule`.
        loss: Loss of a pair: ``sigmoid`` is that of DPO, ``ipo`` that of IPO.
        beta: Strength with which the model is held to the reference, above 0; rewards are so many times log-ratios.
        label_smoothing: Probability that the two answers of a pair are exchanged by mistake; for ``sigmoid``.
        share_prompts: Whether the common beginning of a pair's two rows is computed once by the fast pass.
        kwargs: Arguments of :class:`FireflyModule`.
    """

    totals = PairTotals
    shown_metrics = ("loss", "reward_accuracy")
    has_reference = True

    def __init__(
        self,
        *args: Any,
        loss: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        share_prompts: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("model.beta", beta, above=0)
        if not 0 <= label_smoothing < 0.5:
            raise FireflyError(f"model.label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
        if label_smoothing and loss == "ipo":
            raise FireflyError(
                "model.label_smoothing is of the sigmoid loss only; leave it out, or set model.loss: sigmoid"
            )
        self.loss: PreferenceLoss = loss
        self.beta, self.label_smoothing, self.share_prompts = beta, label_smoothing, share_prompts
        self.reference = ReferenceLogProbs()
        self._measures = False

    def setup(self, stage: str) -> None:
        """Refuses what cannot be used, before weights are loaded.

        Raises:
            FireflyError: If the data has no pairs, or something else cannot be used.
        """
        super().setup(stage)
        data = data_of(self.trainer)
        planned = [getattr(data, name, None) for name in ("train", "val", "test")]
        if stage != "predict" and not any(isinstance(one, PlannedPairs) for one in planned):
            raise FireflyError(
                "data: preferences are learned of pairs; set data.class_path to firefly_lightning.PreferenceDataModule"
            )

    def summed_loss(self, batch: MicroBatch) -> Summed:
        """The losses of a micro-batch's pairs, to be divided by the number of pairs in the step."""
        pairs = cast(PairBatch, batch)
        losses, figures = self._judge(pairs, self.trainer.train_dataloader)
        return Summed(losses.sum(), batch["step_rows"], {name: values.sum() for name, values in figures.items()})

    def computed_lengths(self, batch: MicroBatch) -> list[int]:
        """Tokens of each pair where its common beginning is computed once, else of each of its two rows."""
        shares = self._shares and "spans" in batch
        return [sum(span) for span in cast(PairBatch, batch)["spans"]] if shares else batch["lengths"]

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> Any:
        """Adds a micro-batch to the metrics; while the reference is measured, gives log-probabilities, (pairs, 2)."""
        if self._measures:
            return self.log_probs(cast(PairBatch, batch)).sums
        return super().validation_step(batch, batch_idx)

    def add_to_totals(self, batch: MicroBatch, totals: PairTotals) -> None:
        """Adds the pairs of a micro-batch to the totals of an evaluation."""
        loader = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        losses, figures = self._judge(cast(PairBatch, batch), loader)
        kinds = batch["kinds"] if totals.kinds is not None else torch.zeros_like(batch["kinds"])
        totals.add_pairs(losses, figures, kinds)

    def asked(self, batch: MicroBatch) -> MicroBatch:
        """The rows of the chosen answers."""
        return chosen_rows(cast(PairBatch, batch))

    def log_probs(self, batch: PairBatch) -> AnswerLogProbs:
        """Log-probabilities of the answers of pairs under the model as it is, with gradients."""
        forward = self.forward_pass
        if isinstance(forward, FastBloom):
            found = forward.target_log_probs(batch, shared_prompts(batch) if self._shares else None)
        else:
            found = forward.target_log_probs(batch)
        return answer_log_probs(found, batch["target_rows"], len(batch["rows"]))

    def scores(self, policy: AnswerLogProbs, reference: Tensor) -> PairScores:
        """Losses and rewards of pairs; a subclass with another loss has its own.

        Args:
            policy: Log-probabilities under the model that learns.
            reference: (pairs, 2) sums of log-probabilities under the reference.
        """
        return pair_scores(policy, reference, self.loss, self.beta, self.label_smoothing)

    def on_fit_start(self) -> None:
        """Has the reference's log-probabilities computed, unless the run goes on from a checkpoint that has them."""
        super().on_fit_start()
        self._ensure("train", "val")

    def on_validation_start(self) -> None:
        """Has the reference's log-probabilities of a validation that is no part of a training computed."""
        self._ensure("val")

    def on_test_start(self) -> None:
        """Has the reference's log-probabilities of a test computed."""
        self._ensure("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reference's log-probabilities: a resumed run needs neither the first weights nor the cache."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[REFERENCE_KEY] = dict(self.reference.known)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the reference's log-probabilities.

        Raises:
            FireflyError: If a training is to go on from a checkpoint that has none, those of other pairs, or another
                loss.
        """
        super().on_load_checkpoint(checkpoint)
        self.reference.take(checkpoint.get(REFERENCE_KEY, {}))
        trainer = self._trainer
        data = data_of(trainer)
        if trainer is None or trainer.state.fn != "fit" or data is None or data.train is None:
            return
        if REFERENCE_KEY not in checkpoint:
            raise FireflyError(
                f"{trainer.ckpt_path}: was saved by a training that has no reference; to tune its model by "
                "preferences, write a folder with firefly export and name that as model.path"
            )
        self._check_same_loss(checkpoint)
        if isinstance(data.train, PlannedPairs) and not self.reference.fits(data.train.rows):
            raise FireflyError(
                f"{trainer.ckpt_path}: its reference log-probabilities are of other pairs than data.train_files; "
                "resume with the same rows, data.max_length and data.too_long"
            )
        if trainer.strategy.restore_checkpoint_after_setup:  # on_fit_start has come before
            self._ensure("train", "val", resumed=True)

    def _check_same_loss(self, checkpoint: dict[str, Any]) -> None:
        """Sees that a resumed training goes on with its loss: another one would be measured against the old one's."""
        saved = checkpoint.get("hyper_parameters")
        for name in ("loss", "beta", "label_smoothing"):
            before, now = (saved if isinstance(saved, Mapping) else {}).get(name), getattr(self, name)
            if before is not None and before != now:
                raise FireflyError(
                    f"model.{name}: the checkpoint was trained with {before}, this run has {now}; resume with "
                    f"{before}, or write a folder with firefly export and name that as model.path"
                )

    @property
    def _shares(self) -> bool:
        return self.share_prompts and isinstance(self.forward_pass, FastBloom)

    def _judge(self, batch: PairBatch, loader: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of pairs, (pairs,), and their figures; ``loader`` is where they come from."""
        planned = batches_of(loader)
        if not isinstance(planned, PlannedPairs):
            raise FireflyError("data: the loaders have no pairs; take those of firefly_lightning.PreferenceDataModule")
        policy = self.log_probs(batch)
        reference = self.reference.of(planned.rows, batch["rows"])
        scores = self.scores(policy, reference)
        return scores.losses, figures_of(policy, scores)

    def _ensure(self, *parts: str, resumed: bool = False) -> None:
        """Sees that the reference's log-probabilities of some parts of the data are known.

        A sharded model that resumes is loaded after ``on_fit_start``, which then leaves all to ``on_load_checkpoint``.
        """
        trainer = self.trainer
        fits = trainer.state.fn == "fit"
        begins_with = trainer.ckpt_path or getattr(trainer._checkpoint_connector, "_hpc_resume_path", None)
        if fits and "train" not in parts:  # a validation of a training
            return
        if fits and begins_with and trainer.strategy.restore_checkpoint_after_setup and not resumed:
            return
        data: Any = data_of(trainer)
        wanted = {id(one.rows): one for one in (getattr(data, part, None) for part in parts) if one is not None}
        missing = [one for one in wanted.values() if not self.reference.fits(one.rows)]
        if not missing:
            return
        too_early = fits and not hooks_of(trainer.strategy).evaluates_first
        trained = bool(begins_with) and self.adapter is None
        cache, compute = self._cache(), None if trained or too_early else self._compute()
        for batches in missing:
            if not ensure_reference(self.reference, batches, cache, compute):
                names = ", ".join(batches.rows.names)
                why = "this strategy cannot measure them before the first step"
                if trained:
                    why = f"the weights of {begins_with} are not the reference any more"
                raise FireflyError(
                    f"{names}: no reference log-probabilities of these pairs are known, and {why}; first run "
                    "firefly-fit validate without ckpt_path, with the first model and these pairs as data.val_files"
                )

    def _compute(self) -> Compute:
        trainer = self.trainer

        def evaluate(batch: PairBatch) -> Tensor:
            with without_adapter(self.model):
                found = trainer.strategy.validation_step(batch, 0)
            return cast(Tensor, found)

        compute = computed_by(trainer, evaluate)

        def measured(*arguments: Any) -> Tensor:
            self._measures = True
            try:
                return compute(*arguments)
            finally:
                self._measures = False

        return measured

    def _cache(self) -> ReferenceCache:
        """The cache of this model's log-probabilities; none of random weights, which no file has."""
        trainer, data, weights = self.trainer, cast(Any, data_of(self.trainer)), self.initial_weights()
        model = weights and f"{weights}, {trainer.precision}, {type(self.forward_pass).__name__}"
        return ReferenceCache(data.cache_dir, model, trainer.strategy.broadcast, trainer.is_global_zero)
