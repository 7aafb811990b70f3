"""NEFTune: noise on the embeddings of training rows.

Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import BloomForCausalLM


class Neftune:
    """Adds noise to the word embeddings of a Bloom while a micro-batch is trained on.

    The noise of a row of n tokens is uniform in ±alpha / √(n · hidden_size); padding does not count.

    Args:
        alpha: Strength of the noise; 0 for none.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: Sequence[int] | None = None

    def attach(self, bloom: BloomForCausalLM) -> None:
        """Has a model add the noise, before the norm that follows its embedding."""
        if self._alpha:
            bloom.transformer.word_embeddings_layernorm.register_forward_pre_hook(self._add)

    @contextmanager
    def on(self, lengths: Sequence[int]) -> Iterator[None]:
        """Adds noise to what the model is called with meanwhile.

        Args:
            lengths: Number of tokens of each row.
        """
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def _add(self, norm: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        """Embeddings with noise: (tokens, hidden_size) of rows one after another, or (rows, length, hidden_size)."""
        if self._lengths is None:
            return None
        (embedded,) = inputs
        lengths = torch.tensor(self._lengths, device=embedded.device)
        bounds = self._alpha / (lengths * embedded.shape[-1]).sqrt()
        if embedded.dim() == 2:
            bounds = bounds.repeat_interleave(lengths)
        bounds = bounds.reshape(-1, *[1] * (embedded.dim() - 1)).to(embedded.dtype)
        return (embedded + torch.empty_like(embedded).uniform_(-1, 1) * bounds,)
