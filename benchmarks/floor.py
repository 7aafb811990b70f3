"""The time of a step's bare matrix products, a floor under every program that computes the same step exactly.

It also measures the rates of bare products and copies.
"""

import time
from collections.abc import Callable

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def matrix_products(
    tokens: int,
    targets: int,
    hidden: int,
    layers: int,
    vocabulary: int,
    dtype: str,
    frozen: bool = False,
    device: str = "cpu",
) -> float:
    """Measures the seconds of the linear layers at all tokens and the head at targets, each with both gradients.

    In the last block, only queries, keys and values are needed at all tokens. Products of attention are not counted,
    nor those of an adapter, whose matrices are narrow.

    Args:
        tokens: Tokens of the step, without padding.
        targets: Learned tokens of the step.
        hidden: Width of the model.
        layers: Number of blocks of the model.
        vocabulary: Rows of the model's embedding, to which the head is tied.
        dtype: A key of ``DTYPES``.
        frozen: Whether the weights are frozen, so that the gradients of inputs are computed only.
        device: Where the products are computed.
    """
    wide, others = [(hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)], layers - 1
    shapes = [(tokens, hidden, 3 * hidden, layers), (targets, hidden, vocabulary, 1)]
    shapes += [(rows, *size, times) for size in wide for rows, times in ((tokens, others), (targets, 1))]
    seconds = 0.0
    for rows, inner, outer, times in shapes:
        inputs, weight, gradient = (
            torch.randn(shape, dtype=DTYPES[dtype], device=device)
            for shape in ((rows, inner), (outer, inner), (rows, outer))
        )
        _ = inputs[:1] @ weight.t()  # on a GPU, the first product of a kind takes longer
        _wait()
        began = time.perf_counter()
        for _ in range(times):
            _ = inputs @ weight.t(), gradient @ weight
            if not frozen:
                _ = gradient.t() @ inputs
        _wait()
        seconds += time.perf_counter() - began
    return seconds


def product_rate(dtype: str, device: str = "cpu", size: int = 2048) -> float:
    """Measures the floating-point operations a second of a bare product with the shape of a linear layer."""
    left, right = (torch.randn(shape, dtype=DTYPES[dtype], device=device) for shape in ((size, 512), (512, size)))
    return 20 * 2 * left.numel() * size / _seconds(lambda: left @ right, 20)


def copy_rate() -> float:
    """Measures the bytes a second that a bare copy reads and writes."""
    source, target = torch.ones(2**25), torch.ones(2**25)
    return 5 * 2 * source.nbytes / _seconds(lambda: target.copy_(source), 5)


def _seconds(run: Callable[[], object], times: int) -> float:
    run()
    _wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    """Waits for a GPU, which works while the program goes on."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
