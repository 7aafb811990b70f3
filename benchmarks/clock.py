"""A clock for the seconds and tokens of the training steps that count."""

import time

import torch


class Clock:
    """Measures the seconds of all steps but the first few.

    Args:
        warmup: Number of first steps that do not count.

    Attributes:
        counts: For every step, the number of its tokens without padding and of its learned tokens.
    """

    def __init__(self, warmup: int) -> None:
        self._warmup, self._steps = warmup, 0
        self.counts: list[tuple[int, int]] = []
        self._began = self._ended = 0.0

    def step_ended(self) -> None:
        """Notes that a step has ended; to be called after every optimizer step."""
        self._steps += 1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self._ended = time.perf_counter()
        if self._steps == self._warmup:
            self._began = self._ended

    @property
    def seconds(self) -> float:
        """Seconds from the end of the last step that does not count to the end of the last step."""
        return self._ended - self._began
