"""Seconds and tokens of the steps that count."""

import time


class Clock:
    """Seconds of the steps after the first few.

    Args:
        warmup: Steps that do not count.

    Attributes:
        counts: Of every step, its tokens without padding and those of them that are learned.
    """

    def __init__(self, warmup: int) -> None:
        self._warmup, self._steps = warmup, 0
        self.counts: list[tuple[int, int]] = []
        self._began = self._ended = 0.0

    def step_ended(self) -> None:
        """To be called after every optimizer step."""
        self._steps += 1
        self._ended = time.perf_counter()
        if self._steps == self._warmup:
            self._began = self._ended

    @property
    def seconds(self) -> float:
        """From the end of the last step that does not count to the end of the last."""
        return self._ended - self._began
