"""Signals that end a run: a training ends between two optimizer steps, in all processes together; all else at once."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.interrupts import Terminated, end_now, listen

_ENDS = (signal.SIGTERM, signal.SIGINT)
"""Signals that end a training."""


class Signals:
    """Notes SIGTERM and SIGINT, and under SLURM its signal to requeue, in place of Lightning's handlers.

    Lightning's handlers act in the middle of whatever runs: a checkpoint would hold half a step, and a collective
    operation would meet one of another kind on the next process.

    Args:
        trainer: A trainer that has set up its own handlers; when it ends, it restores the handlers from before.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer, self._process = trainer, os.getpid()
        self._noted: set[int] = set()
        self._ending: int | None = None
        environment = getattr(trainer.strategy, "cluster_environment", None)
        self._requeue: int | None = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal or signal.SIGUSR1
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, (*_ENDS, self._requeue)):
                signal.signal(number, self._note)

    def obey(self, save: Callable[[], None]) -> None:
        """Saves the run, or has SLURM requeue it, if any process got a signal; all call this after the same step."""
        told = self._trainer.strategy.reduce_boolean_decision
        if self._requeue and told(self._requeue in self._noted, all=False):
            self._noted.discard(self._requeue)
            connector: Any = self._trainer._signal_connector
            connector._slurm_sigusr_handler_fn(self._requeue, None)
        for number in _ENDS:
            if self._ending is None and told(number in self._noted, all=False):
                save()
                self._ending = number

    def end(self) -> None:
        """Ends a run that got a signal to end; called before the next step, when the last step's metrics are logged.

        Raises:
            Terminated: If the run ends; with exit code 143 or 130.
        """
        if self._ending is not None:
            name = signal.Signals(self._ending).name
            rank_zero_info(f"Ended by {name}; the last step is saved, resume with --ckpt_path last")
            raise Terminated(self._ending)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that loads data has no step to finish
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number in self._noted and number in _ENDS:
            end_now(number)
        self._noted.add(number)


class EndOnSignals(Callback):
    """Ends a validation, a test or a prediction within seconds of SIGTERM or Ctrl-C, in place of Lightning's handlers.

    Lightning's handlers would let it run to its end.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the signals back from Lightning, until training has its own way to end."""
        listen()
