"""Saves that go on beside the training: one after another, each whole before what depends on it is done."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from firefly_lightning.errors import FireflyError

PATIENCE = 60.0
"""Seconds that a save waits for the other processes once the run of this one has ended in an error."""

_LOOK_EVERY = 0.02

Together = Callable[[Callable[[], None]], Any]
"""Calls a function in all processes of a run, and raises in all of them where it fails in one."""


class OthersAreGone(FireflyError):
    """Other processes have not written their parts of a checkpoint; one of them has said why."""


class BackgroundSaves:
    """A thread that completes saves, in the order in which they began, and what is to be done after them.

    A failure is kept until it is raised, in the training's own thread; nothing is done after it until then.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None  # only where something is saved: a plugin may be copied or pickled
        self._acts: list[Future[None]] = []
        self._waits = False
        self._patience: float | None = None

    def submit(self, act: Callable[[], None]) -> None:
        """Has ``act`` called after all that was submitted before, unless some of that fails."""
        self._pool = self._pool or ThreadPoolExecutor(1, "saves")
        earlier = self._acts = [before for before in self._acts if not _is_well(before)]

        def after_those_before() -> None:
            if not any(before.exception() for before in earlier):
                act()

        self._acts = [*earlier, self._pool.submit(after_those_before)]

    def after(self, act: Callable[[], None]) -> None:
        """Calls ``act`` once nothing is being saved: at once where that is so now."""
        if self.pending:
            self.submit(act)
        else:
            act()

    @property
    def pending(self) -> bool:
        """Whether something that was submitted is not done, or failed and has not been raised yet."""
        return not all(map(_is_well, self._acts))

    @property
    def failed(self) -> bool:
        """Whether something failed that has not been raised yet."""
        return any(act.done() and act.exception() for act in self._acts)

    def settle(self, together: Together) -> None:
        """Waits until all that was submitted is done in all processes; all of them call this together.

        Raises:
            Exception: What failed in this process or in another one.
        """
        try:
            together(self._wait_for_own_part)
        except Exception:
            self.hurry(0)  # the others have ended: their parts will not come
            raise
        together(self.wait)

    def wait(self) -> None:
        """Waits until all that was submitted is done.

        Raises:
            Exception: What failed first.
        """
        for act in self._acts:
            act.exception()
        self._patience = None
        self._raise_failure()

    def hurry(self, seconds: float = PATIENCE) -> None:
        """Has a save wait no longer than some seconds for other processes, which may be gone."""
        self._patience = seconds

    def wait_for_others(self, are_done: Callable[[], bool]) -> None:
        """Waits, in the thread that saves, for what other processes do.

        Args:
            are_done: Whether they have done it.

        Raises:
            OthersAreGone: If they have not within the time that :meth:`hurry` leaves.
        """
        waited = 0.0
        self._waits = True
        try:
            while not are_done():
                if self._patience is not None and waited >= self._patience:
                    raise OthersAreGone("another process has not written its part; its own message says why")
                time.sleep(_LOOK_EVERY)
                waited += _LOOK_EVERY if self._patience is not None else 0
        finally:
            self._waits = False

    def _wait_for_own_part(self) -> None:
        """Waits until this process has nothing left to do but to wait for others."""
        while not self._waits and not all(act.done() for act in self._acts):
            time.sleep(_LOOK_EVERY)
        self._raise_failure()

    def _raise_failure(self) -> None:
        failures = [failure for act in self._acts if act.done() and (failure := act.exception())]
        self._acts = [act for act in self._acts if not act.done()]
        if failures:
            raise failures[0]


def _is_well(act: "Future[None]") -> bool:
    return act.done() and not act.exception()
