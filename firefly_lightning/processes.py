"""A function over many items on all cores, in their order, with few of them in memory."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """``map(work, items)`` over processes; items are taken only as results are.

    Args:
        work: Can be pickled.
        items: Can be pickled, each large enough to be worth a message.
        workers: Processes; one for each core this process may use where None. One, and a single item, need no process.
    """
    stream = iter(items)
    workers = workers or usable_cores()
    first = list(islice(stream, 2))
    stream = chain(first, stream)
    if workers == 1 or len(first) < 2:
        yield from map(work, stream)
        return
    # A forked process has the modules already; macOS breaks in forked ones.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _begin_work)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in stream:
            under_way.append(pool.submit(work, item))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_work() -> None:
    """Leaves an interrupt to the process that started this one, and ends with it."""
    leave_interrupts_to_parent()
    end_with_parent()


def leave_interrupts_to_parent() -> None:
    """Has this process go on at Ctrl-C, which a terminal sends to it too: its parent says when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ends this process with the one that asked for it, which a kill keeps from saying so.

    PyTorch's own workers watch the process that forked them, which is another where a server forks all.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
