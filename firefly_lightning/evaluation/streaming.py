"""What a thread generates, read as it comes; light to import, since llama.cpp needs no PyTorch for it."""

from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")


def from_thread(produce: Callable[[Callable[[Item], None], Event], None]) -> Generator[Item]:
    """What a function hands on while it runs in a thread, which ends when nobody reads on.

    Args:
        produce: Is called with what takes an item, and an event that is set once no more are wanted.
    """
    items: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
    stopped = Event()

    def run() -> None:
        try:
            produce(lambda item: items.put((item,)), stopped)
            items.put(None)
        except BaseException as error:  # raised again where the items are read
            items.put(error)

    thread = Thread(target=run, name="generate", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stopped.set()
        thread.join()
