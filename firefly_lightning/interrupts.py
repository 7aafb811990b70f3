"""SIGINT and SIGTERM end a command within seconds, whatever it is doing, and leave nothing of its own behind."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE = 2.0
"""Seconds that a command has to tidy up after the first signal; then its process is ended by force."""

_HANDLED = 0x80
"""Added to a signal's number where our handler, not the system, tells the watching thread of the signal."""

_tidying: list[Callable[[], None]] = []
_watch: "_Watch | None" = None


class Terminated(SystemExit):
    """Raised where a signal ends the process; carries the exit code by which a shell knows the signal.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def before_end(tidy: Callable[[], None]) -> None:
    """Registers a function that runs before a command is ended by force, as it did not end in time by itself."""
    _tidying.append(tidy)


@contextmanager
def ends_on_signals(program: str) -> Iterator[None]:
    """Has SIGINT and SIGTERM raise in the block and end the process, with code 130 or 143, however the block ends.

    An exception alone is not enough: it may be raised where Python drops it, or the main thread may be in a library
    that does not return for long. So a thread watches: ``GRACE`` seconds after the first signal, and at once after a
    second one, it ends the process and those that it started.

    Args:
        program: Name of the program, which opens the line that reports the signal.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread() or _watch is not None:
        yield
        return
    _watch = watch = _Watch(program)
    try:
        watch.listen()
        yield
    except KeyboardInterrupt:
        watch.number = watch.number or signal.SIGINT
    except BaseException:
        if watch.number is None:
            raise
    finally:
        if watch.number is None:
            watch.close()
            _watch = None
    if watch.number is not None:  # the watch goes on: ending may hang, too
        watch.report()
        end_children()
        sys.exit(128 + watch.number)


def listen() -> None:
    """Takes the signals back from a library that has set handlers of its own; does nothing outside a command."""
    if _watch is not None and threading.current_thread() is threading.main_thread():
        _watch.listen()


@contextmanager
def interruptible() -> Iterator[None]:
    """Has Ctrl-C only raise ``KeyboardInterrupt`` within the block: in a conversation it stops just the answer."""
    if _watch is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        listen()


def end_now(number: int) -> None:
    """Ends this process, and those that it started, as the signal of this number ends a command."""
    (_watch or _Watch("firefly")).end(number)


def leave_to_system() -> None:
    """Has SIGINT and SIGTERM end the process at once; a command calls this last, when there is nothing to tidy up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def end_children() -> None:
    """Kills the processes that this one has started, and those that they have started."""
    import psutil  # here, since only ending a command needs it: a start does without

    with suppress(psutil.Error):
        children = psutil.Process().children(recursive=True)
        for child in children:
            with suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=0.5)  # they would be zombies where nobody waits for orphans


class _Watch:
    """A thread that the system itself tells of signals, so that it learns of them whatever the main thread does."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.number: int | None = None
        self._reported = False
        self._before: dict[int, Any] = {}
        self._unraisable_before = sys.unraisablehook
        self._told, self._tells = socket.socketpair()

    def listen(self) -> None:
        if not self._before:
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._tells.setblocking(False)
            signal.set_wakeup_fd(self._tells.fileno(), warn_on_full_buffer=False)
            sys.unraisablehook = self._unraisable
            threading.Thread(target=self._watch, daemon=True, name="signals").start()
        for number in self._before:
            signal.signal(number, self._raise)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._unraisable_before
        self._tells.close()

    def _unraisable(self, lost: Any) -> None:
        """Hides an ending exception that Python drops, as in a hook of ``fork``: the watch ends the process anyway."""
        if self.number is None or not isinstance(lost.exc_value, KeyboardInterrupt | Terminated):
            self._unraisable_before(lost)

    def report(self) -> None:
        if not self._reported and not int(os.environ.get("LOCAL_RANK", 0)):
            self._reported = True
            said = "interrupted" if self.number == signal.SIGINT else "ended by SIGTERM"
            with suppress(OSError):
                os.write(2, f"{self.program}: error: {said}\n".encode())

    def end(self, number: int) -> None:
        self.number = self.number or number
        self.report()
        end_children()
        for tidy in _tidying:
            with suppress(Exception):  # the process ends, whatever could not be tidied up
                tidy()
        os._exit(128 + self.number)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            self.end(number)
        self.number = number
        importing = _imports(frame)
        with suppress(OSError):
            # A module may be brought up by C++ that ends the process where Python raises, as PyTorch's does; so an
            # import goes on until the watch ends the process, which it does at once, as after a second signal.
            self._tells.send(bytes([number | _HANDLED, *([number] if importing else [])]))
        if not importing:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def _watch(self) -> None:
        """Waits for a signal that our handler takes, then for a second one or ``GRACE`` seconds; ends the process."""
        first = 0
        while not first:
            told = self._told.recv(1)
            if not told:
                return
            first = self._ours(told[0])
        self._told.settimeout(0.05)
        deadline, received = time.monotonic() + GRACE, 1
        while time.monotonic() < deadline and received < 2:
            with suppress(TimeoutError):
                told = self._told.recv(1)
                received += bool(told) and told[0] in (signal.SIGINT, signal.SIGTERM)
        self.end(first)

    def _ours(self, told: int) -> int:
        """The number of a signal that our handler takes, else 0; a run that trains has a handler of its own."""
        number = told & ~_HANDLED
        ours = told & _HANDLED or (number in self._before and signal.getsignal(number) == self._raise)
        return number if ours else 0


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the main thread is."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _begin_child() -> None:
    """Gives a forked process the default handlers, so that its signals are not reported to its parent's watch."""
    global _watch
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _watch = None


os.register_at_fork(after_in_child=_begin_child)
