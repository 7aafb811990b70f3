"""Attention within packed rows, which lie one after another without padding, by PyTorch's fused kernel.

ALiBi and causality are one bias that all rows share. On a processor each row has a call of its own; on a GPU they
share one, padded.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import _global_forward_hooks

Attended = tuple[Any, Callable[[Any], Tensor]]
"""The contexts of attention as a kernel gives them, and a function that joins them to (tokens, heads · head_dim)."""

Attend = Callable[[Any, Tensor], Attended]
"""Computes attention from the module and its fused queries, keys and values, (tokens, heads · 3 · head_dim)."""

Scores = Callable[..., Tensor]
"""PyTorch's fused attention with the settings of a module: of query, key, value and ``attn_mask``."""

ALIGNED = 8
"""What rows of a bias are padded to: PyTorch's attention on GPUs copies one whose strides are no multiples of it."""

ENGINES = ("torch.distributed", "deepspeed", "colossalai", "accelerate")
"""Packages whose hooks on a module do not look at attention weights."""


class Packing(Protocol):
    """Tokens that are computed one after another without padding, and which of them attend to which."""

    @property
    def positions(self) -> Tensor:
        """(tokens,) place of each token in padded, flattened rows (rows · length)."""

    @property
    def targets(self) -> Tensor:
        """(targets,) which of the tokens are followed by a learned token; one may be named twice."""

    def one_by_one(
        self, split: Tensor, bias: "AlibiBias", scores: Scores, kept: torch.dtype | None
    ) -> Sequence[Tensor]:
        """The contexts of all tokens in order, each part (1, heads, its tokens, head_dim), by a call or two for a row.

        Args:
            split: (tokens, heads, 3, head_dim) queries, keys and values.
            bias: What ALiBi and causality add to the scores.
            scores: Computes attention.
            kept: The narrower type in which autograd keeps queries, keys and values; None for their own.
        """

    def padded(self, split: Tensor, bias: "AlibiBias", scores: Scores) -> Sequence[Tensor]:
        """One context of padded rows, (rows, heads, length, head_dim), by one call; arguments as above."""


class PackedRows(NamedTuple):
    """The places of a micro-batch's rows when they lie one after another without padding.

    Attributes:
        lengths: Number of tokens of each row.
        positions: (tokens,) place of each token in the padded, flattened (rows · length).
        targets: (targets,) which of the tokens are followed by a learned token.
    """

    lengths: list[int]
    positions: Tensor
    targets: Tensor

    def one_by_one(
        self, split: Tensor, bias: "AlibiBias", scores: Scores, kept: torch.dtype | None
    ) -> Sequence[Tensor]:
        """See :class:`Packing`."""
        return _attend_row_by_row(split, self.lengths, bias, scores, kept)

    def padded(self, split: Tensor, bias: "AlibiBias", scores: Scores) -> Sequence[Tensor]:
        """See :class:`Packing`."""
        return _attend_padded(split, self, bias, scores)


class AlibiBias:
    """The bias that ALiBi and causality add to attention scores.

    The bias for the longest row so far is kept, since it contains the bias for every shorter row. Distances are counted
    from a query's own position, which makes no difference to softmax: the values for near positions, which matter most,
    are then exact in bfloat16 too.

    Args:
        heads: Number of attention heads of the whole model.
        own: The heads that this process computes; all by default.
    """

    def __init__(self, heads: int, own: slice = slice(None)) -> None:
        self._slopes = alibi_slopes(heads)[own]
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, length: int, like: Tensor) -> Tensor:
        """The bias, (1, heads, length, length), of the type and on the device of ``like``."""
        key = like.device, like.dtype
        kept = self._kept.get(key)
        if kept is None or kept.shape[-1] < length:
            kept = self._kept[key] = self._make(bias_side(length)).to(like)
        return kept[..., :length, :length]

    def _make(self, length: int) -> Tensor:
        positions = torch.arange(length)
        distances = positions - positions[:, None]
        bias = self._slopes[:, None, None] * distances
        return bias.masked_fill(distances > 0, -torch.inf)[None]


def bias_side(length: int) -> int:
    """Length and width of the bias that is made for rows of up to ``length`` tokens."""
    return -(-length // ALIGNED) * ALIGNED


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head, (heads,), after Press, Smith and Lewis, "Train Short, Test Long" (2022).

    Where the number of heads is a power of two, the slopes are a geometric sequence that begins with 2^(-8/heads).
    Otherwise the first heads have the slopes of the next lower power of two, and the heads that are left have every
    second slope of twice that power.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    return torch.tensor(slopes)


def attend_within(attention: Any, fused: Tensor, rows: Packing, bias: AlibiBias, spares: bool) -> Attended:
    """Computes attention within packed rows; an :data:`Attend` once rows, bias and ``spares`` are bound.

    Args:
        attention: The attention module of a block.
        fused: (tokens, heads · 3 · head_dim) queries, keys and values.
        rows: How the tokens lie.
        bias: What ALiBi and causality add to the scores.
        spares: Whether the float32 copies that 16-bit attention makes on a CPU are kept in 16 bits.
    """
    split = fused.view(len(fused), -1, 3, attention.head_dim)
    dropout = attention.attention_dropout.p if attention.training else 0.0
    scores = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=attention.inv_norm_factor)
    if fused.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            # The gradient of the fused kernel is slower in bfloat16 than in float32 on processors.
            contexts = rows.one_by_one(split.float(), bias, scores, fused.dtype if spares else None)
        return contexts, partial(_join_rows, dtype=fused.dtype)
    return rows.padded(split, bias, scores), partial(_join_padded, positions=rows.positions)


def _attend_row_by_row(
    split: Tensor, lengths: list[int], bias: AlibiBias, scores: Scores, kept: torch.dtype | None
) -> list[Tensor]:
    """The context of each row, by a call for each: on a CPU a call costs little, and padding much.

    ``split`` and ``unbind`` are used because the gradient of either is a single copy.
    """
    contexts = []
    for row, length in zip(torch.split(split, lengths), lengths, strict=True):
        query, key, value = row.permute(2, 1, 0, 3).unsqueeze(1).unbind()  # each (1, heads, length, head_dim)
        with kept_as(kept, query, key, value):
            contexts.append(scores(query, key, value, attn_mask=bias(length, query)))
    return contexts


def kept_as(dtype: torch.dtype | None, *tensors: Tensor) -> AbstractContextManager[Any]:
    """Lets autograd keep float32 tensors in the narrower type that their values come from."""
    if dtype in (None, torch.float32):
        return nullcontext()
    numbers = {id(tensor) for tensor in tensors}
    return saved_tensors_hooks(lambda saved: saved.to(dtype) if id(saved) in numbers else saved, torch.Tensor.float)


def _join_rows(contexts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([context[0].transpose(0, 1).flatten(1) for context in contexts]).to(dtype)


def _attend_padded(split: Tensor, rows: PackedRows, bias: AlibiBias, scores: Scores) -> list[Tensor]:
    """The contexts of all rows by one call, as is fastest on a GPU.

    Padding follows the last token of a row, so that no query of the row sees it.
    """
    count, longest = len(rows.lengths), max(rows.lengths)
    padded = split.new_zeros(count * longest, *split.shape[1:]).index_copy(0, rows.positions, split)
    query, key, value = padded.view(count, longest, *split.shape[1:]).permute(3, 0, 2, 1, 4).unbind()
    return [scores(query, key, value, attn_mask=bias(longest, query))]


def _join_padded(contexts: Sequence[Tensor], positions: Tensor) -> Tensor:
    (context,) = contexts
    return context.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, positions)


def _is_watched(*modules: nn.Module) -> bool:
    """Whether somebody's hook looks at what modules give, among it the weights that only the stock pass computes."""
    hooks = [*_global_forward_hooks.values(), *(hook for module in modules for hook in module._forward_hooks.values())]
    return any(not str(getattr(hook, "__module__", "")).startswith(ENGINES) for hook in hooks)


def attention_forward(
    block: Any,
    attention: Any,
    stock: Any,
    hidden: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """Attention in one kernel where generation calls it with a cache of keys and values; the stock pass otherwise.

    Args:
        block: The block of the attention module.
        attention: The attention module of a block.
        stock: The module's own forward pass.
        hidden: (rows, length, hidden_size) the input of attention.
        residual: (rows, length, hidden_size) what the result is added to.
        alibi: (rows · heads, 1, positions) what ALiBi adds to the scores.
        attention_mask: (rows, 1, length, positions) what causality and padding add to the scores.
        kwargs: Further keyword arguments of the module's own forward pass.
    """
    cache, watched = kwargs.get("layer_past"), kwargs.get("output_attentions") or _is_watched(block, attention)
    if cache is None or attention.training or watched or kwargs.get("head_mask") is not None:
        return stock(hidden, residual, alibi=alibi, attention_mask=attention_mask, **kwargs)
    query, key, value = attention._reshape(attention.query_key_value(hidden))
    key, value = cache.update(key, value, attention.layer_idx)
    bias = alibi.view(len(query), -1, 1, alibi.shape[-1])
    if attention_mask is not None:
        bias = bias + attention_mask[..., : key.shape[2]]
    context = F.scaled_dot_product_attention(query, key, value, bias.to(query), scale=attention.inv_norm_factor)
    second = cache if "head_mask" in kwargs else None  # transformers 4 gives the cache, 5 the attention weights
    return attention.dense(context.transpose(1, 2).flatten(2)) + residual, second
