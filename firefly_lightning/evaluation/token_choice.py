"""How the next token of an answer is chosen, exactly as Hugging Face's generation does it, many rows at a time."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

_TOP_K = 50
"""Hugging Face's own ``top_k`` where a model does not say one."""

_LIKELIEST = 1024
"""Tokens among which ``top_p`` is looked for before all of them are sorted, which takes longer than a small model."""

_WITHOUT_EFFECT = {"num_beams": (1,), "no_repeat_ngram_size": (0,), "use_cache": (True,)}
"""Values with which these settings change nothing."""

_OF_OTHERS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length", "length_penalty"}
"""Fields of a generation config that are given otherwise, or have no effect beside ``max_new_tokens`` and one beam."""


class TokenChoice(NamedTuple):
    """Settings of generation in Hugging Face's terms: each step of :meth:`choose` is one of its logits processors.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        min_new_tokens: How many tokens an answer has before it may end.
        do_sample: Whether tokens are drawn; else the likeliest is taken.
        temperature: What the logits are divided by before one is drawn.
        top_k: How many of the likeliest tokens one is drawn from; 0 for all.
        top_p: Share of the probability that the likeliest tokens, from which one is drawn, reach together.
        repetition_penalty: What the logits of tokens that are there already are divided by, or multiplied with below 0.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: GenerationConfig) -> "TokenChoice | None":
        """The settings of a generation config; None where it has others, which only Hugging Face's own code knows."""
        given = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
        others = given.keys() - {*cls._fields, *_OF_OTHERS}
        if not config.max_new_tokens or any(given[name] not in _WITHOUT_EFFECT.get(name, ()) for name in others):
            return None
        told = {name: value for name in cls._fields if (value := getattr(config, name)) is not None}
        return cls(**{"top_k": _TOP_K, **told})

    def choose(self, logits: Tensor, seen: Tensor, draws: Tensor) -> Tensor:
        """Ids of the next tokens, (rows,).

        Args:
            logits: (rows, vocab_size) what the model gives; it may be changed.
            seen: (rows, length) ids of all tokens that are there; any of them stands where a row is shorter.
            draws: (rows,) a random number from 0 up to 1 for each row; not looked at unless tokens are drawn.
        """
        scores = logits.float()
        if self.repetition_penalty != 1:
            found = scores.gather(1, seen)
            punished = torch.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
            scores = scores.scatter(1, seen, punished)
        if not self.do_sample:
            return scores.argmax(-1)
        likely, ids = self._candidates(scores / self.temperature)
        reached = likely.cumsum(-1)
        drawn = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
        last = (likely > 0).sum(-1, keepdim=True) - 1  # rounding may lead beyond it
        return ids.gather(1, drawn.minimum(last))[:, 0]

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and ids of the tokens of which one is drawn, the likeliest first; 0 for those left out."""
        size = scores.shape[-1]
        if self.top_k:
            likeliest, ids = scores.topk(min(self.top_k, size))
            likely = likeliest.softmax(-1)
        else:
            likely, ids = self._likeliest(scores, min(_LIKELIEST, size))
            if ids.shape[-1] < size and bool((likely.sum(-1) <= self.top_p).any()):
                likely, ids = self._likeliest(scores, size)
        return likely.masked_fill(likely.cumsum(-1) - likely >= self.top_p, 0), ids

    def _likeliest(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        likeliest, ids = scores.topk(count)
        return (likeliest - scores.logsumexp(-1, keepdim=True)).exp(), ids
