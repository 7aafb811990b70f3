"""Maps a function over many items on all cores, in their order and with few items in memory."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from firefly_lightning.errors import KilledWorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None, *, apart: bool = False
) -> Iterator[Result]:
    """``map(work, items)`` over processes; further items are read only as results are taken.

    Args:
        work: Function of one item; it must be picklable.
        items: Picklable items, each large enough to be worth a message to another process.
        workers: Number of processes; where None, one for each core that this process may use. Where it is one, or there
            is a single item, the work is done in this process, and in a daemonic one, which may have no children.
        apart: Where processes are forked, have even one worker be another process: for a library that begins threads,
            as `rensa` does. A process that is forked later has none of them, and would wait for them for ever.

    Raises:
        KilledWorkerError: If one of the processes is killed.
    """
    stream = iter(items)
    first = list(islice(stream, 2))
    stream = chain(first, stream)
    workers = 1 if len(first) < 2 else workers or usable_cores()
    # A forked process has the modules already; on macOS, forked processes break.
    method = "fork" if sys.platform == "linux" else "spawn"
    if multiprocessing.current_process().daemon or (workers == 1 and not (apart and method == "fork")):
        yield from map(work, stream)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _begin_work)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in stream:
            under_way.append(pool.submit(work, item))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise KilledWorkerError(
            "a worker process was killed, perhaps for want of memory; give the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_work() -> None:
    """Has a worker leave interrupts to the process that started it, and end with that process."""
    leave_interrupts_to_parent()
    end_with_parent()


def leave_interrupts_to_parent() -> None:
    """Has this process ignore Ctrl-C, which a terminal sends to it too: its parent decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ends this process when the one that asked for it ends, also if that one is killed and cannot say so.

    PyTorch's own workers watch the process that forked them instead, which may be a server that forks all processes.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
