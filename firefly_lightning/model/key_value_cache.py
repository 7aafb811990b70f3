"""Keys and values of rows that are generated together, each in a place of its own, without padding before it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firefly_lightning.model.attention import Attended, alibi_slopes
from firefly_lightning.model.fast_bloom import FastBloom

_ROOM = 256
"""Tokens by which places grow, so that they are seldom copied."""

_PIECE = 512
"""Most tokens of a prompt that are computed at a time: the scores of attention take memory by their square."""


class KeyValueCache:
    """Runs a Bloom token by token over rows of any lengths. Each row has a place, and counts positions from its start.

    Args:
        bloom: The model, whole on this device.
        places: Most rows that are kept at a time.
    """

    def __init__(self, bloom: FastBloom, places: int) -> None:
        self._bloom, self._places, self._length = bloom, places, 0
        self._slopes = alibi_slopes(bloom.heads).to(bloom.device)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (places, heads, length, head_dim)

    def fill(self, place: int, ids: Sequence[int], start: int = 0) -> Tensor:
        """Computes a row's prompt.

        Args:
            place: Where the row is kept from now on.
            ids: Token ids of the prompt.
            start: How many of them, fewer than all, the place holds already.

        Returns:
            (vocab_size,) the logits of the token that follows.
        """
        self._reserve(len(ids))
        tokens = torch.tensor(ids, device=self._bloom.device)
        for begin in range(start, len(ids), _PIECE):
            positions = torch.arange(begin, min(begin + _PIECE, len(ids)), device=tokens.device)
            attend = partial(self._attend_prompt, place, positions, self._bias(positions[None], int(positions[-1]) + 1))
            logits = self._bloom.logits(tokens[positions], attend, only=positions[-1:] - begin)
        return logits[0]

    def step(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Computes one more token of every row, which are those in the first places.

        Args:
            ids: Id of each row's token.
            positions: Where in its row each of these tokens stands.

        Returns:
            (rows, vocab_size) the logits of the tokens that follow.
        """
        width = max(positions) + 1
        self._reserve(width)
        tokens, at = torch.tensor([ids, positions], device=self._bloom.device)
        return self._bloom.logits(tokens, partial(self._attend_step, at, self._bias(at[:, None], width)))

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a row of ``length`` tokens into another place, whose own row is forgotten."""
        for tensor in (tensor for kept in self._kept.values() for tensor in kept):
            tensor[target, :, :length] = tensor[source, :, :length]

    def _attend_prompt(self, place: int, positions: Tensor, bias: Tensor, attention: Any, fused: Tensor) -> Attended:
        query, key, value = fused.view(len(fused), -1, 3, attention.head_dim).permute(2, 1, 0, 3)
        keys, values = (kept[place : place + 1] for kept in self._of_layer(attention, key))
        keys[0].index_copy_(1, positions, key)
        values[0].index_copy_(1, positions, value)
        context = _attend(attention, query[None], keys, values, bias)
        return context, lambda context: context[0].transpose(0, 1).flatten(1)

    def _attend_step(self, positions: Tensor, bias: Tensor, attention: Any, fused: Tensor) -> Attended:
        rows = len(fused)
        query, key, value = fused.view(rows, -1, 3, attention.head_dim).unbind(2)
        keys, values = (kept[:rows] for kept in self._of_layer(attention, key))
        each = torch.arange(rows, device=positions.device)
        keys[each, :, positions] = key
        values[each, :, positions] = value
        return _attend(attention, query[:, :, None], keys, values, bias), lambda context: context.flatten(1)

    def _of_layer(self, attention: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that are kept of a layer."""
        if attention.layer_idx not in self._kept:
            sizes = (self._places, len(self._slopes), self._length, attention.head_dim)
            self._kept[attention.layer_idx] = like.new_zeros(sizes), like.new_zeros(sizes)
        return self._kept[attention.layer_idx]

    def _reserve(self, length: int) -> None:
        if length > self._length:
            more = -(-(length - self._length) // _ROOM) * _ROOM
            self._length += more
            for layer, kept in self._kept.items():
                keys, values = (F.pad(tensor, (0, 0, 0, more)) for tensor in kept)
                self._kept[layer] = keys, values

    def _bias(self, positions: Tensor, width: int) -> Tensor:
        """What ALiBi and causality add to scores, (rows, heads, queries, width), for queries at (rows, queries)."""
        distances = (torch.arange(width, device=positions.device) - positions[..., None])[:, None]
        return (self._slopes[:, None, None] * distances).masked_fill(distances > 0, -torch.inf)


def _attend(attention: Any, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    width = bias.shape[-1]
    return F.scaled_dot_product_attention(
        query, keys[:, :, :width], values[:, :, :width], bias.to(query), scale=attention.inv_norm_factor
    )
