"""Signals that end a run, obeyed between two optimizer steps by all of its processes together."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Signals:
    """Notes SIGTERM, and under SLURM its signal to requeue, in place of Lightning's handlers.

    Those act in the middle of whatever runs, where a checkpoint would be that of half a step, and a collective
    operation would meet one of another kind on the next process.

    Args:
        trainer: That has set up its own handlers; it restores those before them when it ends.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer, self._process = trainer, os.getpid()
        self._noted: set[int] = set()
        self._ending = False
        environment = getattr(trainer.strategy, "cluster_environment", None)
        self._requeue: int | None = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal or signal.SIGUSR1
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, (signal.SIGTERM, self._requeue)):
                signal.signal(number, self._note)

    def obey(self, save: Callable[[], None]) -> None:
        """Saves, or has SLURM requeue, if any process was told to; called by all after the same step."""
        told = self._trainer.strategy.reduce_boolean_decision
        if self._requeue and told(self._requeue in self._noted, all=False):
            self._noted.discard(self._requeue)
            connector: Any = self._trainer._signal_connector
            connector._slurm_sigusr_handler_fn(self._requeue, None)
        if told(signal.SIGTERM in self._noted, all=False):
            save()
            self._ending = True

    def end(self) -> None:
        """Ends a run that was told to; called before the next step, when the figures of the last are logged.

        Raises:
            SIGTERMException: With exit code 143, that of a process that SIGTERM ends.
        """
        if self._ending:
            rank_zero_info("Ended by SIGTERM; the last step is saved, resume with --ckpt_path last")
            raise SIGTERMException(128 + signal.SIGTERM)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that loads data has no step to finish
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._noted.add(number)
