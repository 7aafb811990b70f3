"""Checkpoints of a run: the last ones and the best."""

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from firefly_lightning import interrupts
from firefly_lightning.callbacks.run_record import is_same_run
from firefly_lightning.callbacks.saving_plugins import in_background, in_own_form
from firefly_lightning.callbacks.signals import Signals
from firefly_lightning.callbacks.unfinished_saves import at_once, have_failed, make_room, settle
from firefly_lightning.checkpoints.io_plugin import NEEDS_PORTABLE, AtomicCheckpointIO
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import FireflyError, check_number
from firefly_lightning.model.metric_names import renamed


class _OfARun(ModelCheckpoint):
    """A callback that removes the checkpoint which a run goes on from as it does others of that run.

    Lightning's keeps it for good, so that each start would leave one more.
    """

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        own = previous != current and Path(previous).parent.absolute() == Path(str(self.dirpath)).absolute()
        return (own and is_same_run(trainer)) or super()._should_remove_checkpoint(trainer, previous, current)


class LastCheckpoint(_OfARun):
    """Keeps ``last.ckpt``, from which ``--ckpt_path last`` resumes; a signal makes it save and end the run.

    SIGTERM and Ctrl-C end the run once the current step is done and saved, with exit code 143 and 130; a second signal
    ends it at once. SLURM's signal before the time limit has the run saved after the step and requeued. It is enough if
    one process gets the signal.

    Args:
        every_n_steps: Number of optimizer steps between two checkpoints.
        keep: How many checkpoints are kept; those before the last are called ``step=N.ckpt``.
        portable: Whether the run's checkpoints can be resumed under any strategy and number of processes. If not, they
            are in the strategy's own form, which may be faster to save. They are in its own form, too, where the
            trainer's ``AtomicCheckpointIO`` says so.
        asynchronous: Whether the training goes on while a checkpoint is written, from a copy in host memory. If the
            next is due before that is done, it waits; its end waits, too.
        dirpath: Folder of the checkpoints; ``checkpoints`` under ``trainer.default_root_dir`` by default.

    Raises:
        FireflyError: If one of the two numbers is below 1, or what is not portable is to be written asynchronously.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        keep: int = 1,
        portable: bool = True,
        asynchronous: bool = False,
        dirpath: str | None = None,
    ) -> None:
        check_number("checkpoint.every_n_steps", every_n_steps, least=1)
        check_number("checkpoint.keep", keep, least=1)
        if asynchronous and not portable:
            raise FireflyError(NEEDS_PORTABLE)
        several = {"save_top_k": keep, "monitor": "step", "mode": "max", "filename": "{step}", "save_last": "link"}
        one = {"save_top_k": 0, "save_last": True}
        super().__init__(dirpath=dirpath, every_n_train_steps=every_n_steps, **(several if keep > 1 else one))
        self.portable, self.asynchronous = portable, asynchronous
        self._run = uuid.uuid4().hex
        self._surplus: list[str] = []
        self._signals: Signals | None = None
        self._has_room = False
        self._validated = -1

    @property
    def state_key(self) -> str:
        """A key that is the same for every interval, since a resumed run may save more or less often."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The checkpoints that are kept, and the run that they belong to."""
        return {**super().state_dict(), "run": self._run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the run that is resumed.

        A run that was killed may not have removed what it kept no longer.
        """
        super().load_state_dict(state)
        self._run = state.get("run", self._run)
        reached = state.get("current_score")  # the step of the last one that had a name of its own
        if self.save_top_k and reached is not None and self.dirpath and self.dirpath == state.get("dirpath"):
            for path in Path(self.dirpath).glob("step=*.ckpt"):
                own = _saved_state(path, self.state_key)
                if own.get("run") == self._run and own["current_score"] <= reached:
                    self._surplus += [str(path)] if str(path) not in self.best_k_models else []

    def file_exists(self, filepath: str | Path, trainer: L.Trainer) -> bool:
        """Whether a checkpoint is in the way; one of a step of this run that is made again is not."""
        if not super().file_exists(filepath, trainer):
            return False
        run = _saved_state(Path(filepath), self.state_key).get("run")
        return not trainer.strategy.broadcast(run == self._run and str(filepath) not in self.best_k_models)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Has checkpoints written beside the training, if told so, or in a user's script in the strategy's own form.

        Raises:
            FireflyError: If another plugin than this project's writes what is to be written asynchronously.
        """
        super().setup(trainer, pl_module, stage)
        if not self.portable:
            trainer.strategy.checkpoint_io = in_own_form(trainer.strategy)
        if self.asynchronous:
            trainer.strategy.checkpoint_io = in_background(trainer.strategy)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to listen to signals, and removes what a run before this one would have removed."""
        super().on_train_start(trainer, pl_module)
        for path in self._surplus:
            self._remove_checkpoint(trainer, path)
        self._surplus = []
        if trainer.ckpt_path:  # after a whole step, which the first micro-batch of the next would save again
            self._last_global_step_saved = trainer.global_step
        self._signals, self._has_room = Signals(trainer), False

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Ends the run if a signal to end it came during the last step, or a save beside the training has failed.

        The last step's metrics are logged by then.

        Raises:
            Terminated: If such a signal came.
            FireflyError: If a save failed, in any process.
        """
        if self._signals:
            self._signals.end()
        if arguments[-1] % trainer.accumulate_grad_batches == 0 and have_failed(trainer):
            settle(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Saves a checkpoint where the interval, or a signal, says so."""
        step_ends = (arguments[-1] + 1) % trainer.accumulate_grad_batches == 0
        if step_ends and not self._has_room:
            self._has_room = True
            make_room(trainer)
        super().on_train_batch_end(trainer, *arguments)
        if self._signals and step_ends:
            with at_once(trainer):
                self._signals.obey(lambda: self._save_now(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes a validation of a training."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step too, where the interval left it out, or a validation came after it had been saved.

        A model's card tells what the last validation of its checkpoint found.
        """
        with at_once(trainer):
            if self._validated == trainer.global_step == self._last_global_step_saved and self._last_checkpoint_saved:
                self._save_checkpoint(trainer, self._last_checkpoint_saved)
            elif not self._should_skip_saving_checkpoint(trainer):
                self._save_now(trainer)
            settle(trainer)
        interrupts.listen()
        if self._signals:  # a signal may have come with the last step
            self._signals.obey(lambda: None)
            self._signals.end()

    def _save_now(self, trainer: L.Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.save_top_k:
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        settle(trainer)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        """Lightning's own would lead ``last.ckpt`` to a checkpoint that is still being written."""
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, AtomicCheckpointIO):
            ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
        elif trainer.is_global_zero:
            io.link(filepath, linkpath)


OF_BEFORE = ("val_perplexity/", "val_accuracy/", "val_eos_accuracy/")
"""Beginnings of the names that metrics of one kind had before; what another module logs is left as it is."""

LONGEST_MONITOR = 50
"""Characters that the name of a checkpoint has of its monitor at most; file systems take 255 bytes in all."""


class BestCheckpoint(_OfARun):
    """Keeps the checkpoint with the lowest validation loss.

    Args:
        monitor: Name of the logged value that is compared.
        mode: Whether the lowest (``min``) or the highest (``max``) value is best.
        save_top_k: How many of the best checkpoints are kept.
        dirpath: Folder of the checkpoints; ``checkpoints`` under ``trainer.default_root_dir`` by default.

    Raises:
        FireflyError: If fewer than -1 checkpoints, all of them, are to be kept.
    """

    def __init__(
        self, monitor: str = "val_loss", mode: str = "min", save_top_k: int = 1, dirpath: str | None = None
    ) -> None:
        check_number("best_checkpoint.save_top_k", save_top_k, least=-1)
        if monitor.startswith(OF_BEFORE):
            rank_zero_info(f"best_checkpoint.monitor {monitor} is called {renamed(monitor)} now; write that")
            monitor = renamed(monitor)
        shown = re.sub(r"[^\w.-]+", "_", monitor)[:LONGEST_MONITOR]  # a kind may have any character, also `/` and `:`
        filename = f"best-step={{step}}-{shown}={{monitored:.4f}}"
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )
        self._run = uuid.uuid4().hex
        self._surplus: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """The scores of the checkpoints that are kept, and the run that they belong to."""
        return {**super().state_dict(), "run": self._run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the scores of the run that is resumed, also of what it saved after the checkpoint it resumes from.

        A run that was interrupted may have validated once more, and one that was killed may have gone on for long.
        """
        super().load_state_dict(state)
        self._run = state.get("run", self._run)
        if self.dirpath and self.dirpath == state.get("dirpath"):
            scores = dict(self.best_k_models)
            for path in Path(self.dirpath).glob("best-*.ckpt"):
                own = _saved_state(path, self.state_key)
                scores |= own["best_k_models"] if own.get("run") == self._run else {}
            self._keep_best({path: score for path, score in scores.items() if Path(path).exists()})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes checkpoints of this run that are among the best no longer."""
        super().on_train_start(trainer, pl_module)
        for path in self._surplus:
            self._remove_checkpoint(trainer, path)
        self._surplus = []

    def lacks(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether a model is among the best and has not been saved.

        Args:
            step: Number of steps after which it was validated.
            metrics: What the validation has found, by name; without the monitored value nothing is lacking.
        """
        value = metrics.get(str(self.monitor))
        if value is None or self.save_top_k == 0:
            return False
        if any(Path(path).name.startswith(f"best-step={step}-") for path in self.best_k_models):
            return False
        worst = float(self.kth_value) if len(self.best_k_models) == self.save_top_k else None
        return worst is None or (value > worst if self.mode == "max" else value < worst)

    def _keep_best(self, scores: dict[str, Any]) -> None:
        ranked = sorted(scores, key=lambda path: float(scores[path]), reverse=self.mode == "max")
        kept = len(ranked) if self.save_top_k == -1 else self.save_top_k
        self.best_k_models = {path: scores[path] for path in ranked[:kept]}
        self._surplus = ranked[kept:]
        if self.best_k_models:
            self.best_model_path, self.kth_best_model_path = ranked[0], ranked[:kept][-1]
            self.best_model_score, self.kth_value = scores[ranked[0]], scores[self.kth_best_model_path]

    def format_checkpoint_name(self, metrics: dict[str, Tensor], *args: Any, **kwargs: Any) -> str:
        """Name of a checkpoint's file; the monitored value has a name of its own in the template of it."""
        value = metrics.get(str(self.monitor), torch.tensor(torch.nan))
        return super().format_checkpoint_name({**metrics, "monitored": value}, *args, **kwargs)


def _saved_state(checkpoint: Path, key: str) -> dict[str, Any]:
    """The state of a callback in a checkpoint; empty where there is none, or it cannot be read."""
    try:
        saved = load_file(trainer_file(checkpoint), "cpu", digested=False)
    except FireflyError:
        return {}
    state: dict[str, Any] = saved.get("callbacks", {}).get(key, {})
    return state
