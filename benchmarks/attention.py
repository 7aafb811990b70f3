"""Ways to compute the attention of a step's rows on a GPU, for :mod:`benchmarks.gpu`.

``padded`` is what training does: rows padded to the longest in PyTorch's fused kernel, with ALiBi and causality as one
bias. ``flex`` gives FlexAttention the rows one after another, with ALiBi as a function of the score, and causality and
the ends of rows as a mask of blocks: no padded copies, and no bias in memory.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.floor import DTYPES
from firefly_lightning.model.attention import AlibiBias, PackedRows, alibi_slopes


def measure(options: argparse.Namespace, steps: Sequence[Any], dtype: str) -> list[dict[str, Any]]:
    """A line for each way: the time of one layer's attention over all steps, and its memory on the GPU.

    Args:
        options: Those of :mod:`benchmarks.throughput`.
        steps: The rows of each step, each its tokens and which of them are learned.
        dtype: A key of ``DTYPES``.
    """
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    heads = options.heads or options.hidden // 64
    head_dim = options.hidden // heads
    on_gpu = options.device == "cuda"
    lengths = [[len(tokens) for tokens, _ in step] for step in steps]
    fused = [torch.randn(sum(rows), heads, 3, head_dim, dtype=DTYPES[dtype]) for rows in lengths]
    lines = []
    for name, way in ways(heads).items():
        given = [split.to(options.device).requires_grad_(on_gpu) for split in fused]
        run = partial(all_steps, way, given, lengths)
        run()  # compiles, and makes the bias
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        memory = {"gpu_mb": round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)} if on_gpu else {}
        lines.append({"attention_by": name, "dtype": dtype, "with_gradients": on_gpu, "seconds": seconds} | memory)
    return lines


def all_steps(
    way: Callable[[Tensor, list[int]], Tensor], given: Sequence[Tensor], lengths: Sequence[list[int]]
) -> None:
    """Attention of each step, and its gradient where one is asked for."""
    for split, rows in zip(given, lengths, strict=True):
        context = way(split, rows)
        if split.requires_grad:
            torch.autograd.grad(context, split, torch.ones_like(context))


def ways(heads: int) -> dict[str, Callable[[Tensor, list[int]], Tensor]]:
    """Functions of queries, keys and values, (tokens, heads, 3, head_dim), and the rows' lengths; by name.

    Each gives the contexts, (tokens, heads, head_dim).
    """
    return {"padded": partial(padded, AlibiBias(heads)), "flex": partial(flexible, alibi_slopes(heads))}


def padded(bias: AlibiBias, split: Tensor, lengths: list[int]) -> Tensor:
    """As :class:`~firefly_lightning.model.fast_bloom.FastBloom` does on a GPU."""
    longest = max(lengths)
    places = [row * longest + place for row, length in enumerate(lengths) for place in range(length)]
    positions = torch.tensor(places, device=split.device)
    (context,) = PackedRows(lengths, positions, positions).padded(split, bias, F.scaled_dot_product_attention)
    return context.transpose(1, 2).flatten(0, 1).index_select(0, positions)


def flexible(slopes: Tensor, split: Tensor, lengths: list[int]) -> Tensor:
    """By FlexAttention, compiled on a GPU."""
    device = split.device
    slopes = slopes.to(device)
    row = torch.repeat_interleave(torch.tensor(lengths, device=device), output_size=len(split))  # number of each's row

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (row[query] == row[key]) & (key <= query)

    def with_alibi(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (key - query)

    make_mask, attend = functions(device.type == "cuda")
    mask = make_mask(sees, None, None, len(split), len(split), device=device)
    query, key, value = split.permute(2, 1, 0, 3).unsqueeze(1).unbind()
    context: Tensor = attend(query, key, value, score_mod=with_alibi, block_mask=mask)
    return context[0].transpose(0, 1)


@cache
def functions(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes a mask of blocks, and FlexAttention; compiled once for any number of tokens."""
    if compiled:
        return torch.compile(create_block_mask, dynamic=True), torch.compile(flex_attention, dynamic=True)
    return create_block_mask, flex_attention
