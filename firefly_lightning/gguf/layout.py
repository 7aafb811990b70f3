"""The tensors of a Bloom as llama.cpp has them: other names, and query, key and value apart, not head by head."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firefly_lightning.errors import FireflyError

Weights = Mapping[str, Callable[[], Tensor]]
"""What gives each weight of a ``BloomForCausalLM``, by its name; a weight is in memory only while it is looked at."""

_OUTER = {
    "transformer.word_embeddings.weight": "token_embd.weight",
    "transformer.word_embeddings_layernorm.weight": "token_embd_norm.weight",
    "transformer.word_embeddings_layernorm.bias": "token_embd_norm.bias",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
_OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
ENDS = ("token_embd.weight", "output.weight")
"""Embedding and head, of which the first is both where they are one."""


class GgufTensor(NamedTuple):
    """A tensor of a GGUF.

    Attributes:
        name: Its name there.
        shape: Its sizes, those of PyTorch.
        load: Gives its values.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Refuses a Bloom whose forward pass llama.cpp does not have.

    Args:
        config: Fields of ``config.json``.
        where: Name of the model, which opens the message.

    Raises:
        FireflyError: If it takes residuals from behind the layer norms.
    """
    if config.get("apply_residual_connection_post_layernorm"):
        raise FireflyError(
            f"{where}: apply_residual_connection_post_layernorm is not in llama.cpp; no GGUF can be made"
        )


def tensors_of(weights: Weights, shapes: Mapping[str, tuple[int, ...]], heads: int) -> Iterator[GgufTensor]:
    """The tensors of a GGUF, in the order of the model's weights.

    Args:
        weights: The weights of the model; the head only where it is not the embedding.
        shapes: Their sizes.
        heads: Number of attention heads.
    """
    for name, load in weights.items():
        if name in _OUTER:
            yield GgufTensor(_OUTER[name], shapes[name], load)
            continue
        found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name)
        if not found or found[2] not in _OF_BLOCK:
            raise FireflyError(f"{name}: is no weight of a Bloom that llama.cpp knows")
        split = found[2] == "self_attention.query_key_value"
        made = partial(_apart, load, heads) if split else load
        yield GgufTensor(f"blk.{found[1]}.{_OF_BLOCK[found[2]]}.{found[3]}", shapes[name], made)


def _apart(load: Callable[[], Tensor], heads: int) -> Tensor:
    """All queries, all keys, all values, of a weight or bias that has the three of each head together."""
    stored = load()
    parts = stored.view(heads, 3, -1, *stored.shape[1:])
    return torch.cat([parts[:, kind].flatten(0, 1) for kind in range(3)])
