"""The learning rate over a run."""

import math


def cosine_with_warmup(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate: up from 0 in a line, then down to 0 along half a cosine.

    The same as that of transformers' ``get_cosine_schedule_with_warmup``, whose module imports peft and bitsandbytes
    where they are installed, a fifth of the time that a start takes.

    Args:
        step: Optimizer steps that were taken.
        warmup: Steps of the way up.
        steps: All of them.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.
    """
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
