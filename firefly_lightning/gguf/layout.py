"""The tensors of a Bloom as llama.cpp has them: other names, and query, key and value apart, not head by head."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BloomConfig

from firefly_lightning.errors import FireflyError, some

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
        source: Its name in the model.
        shape: Its sizes, those of PyTorch.
        load: Gives its values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def check_architecture(config: BloomConfig, where: str) -> None:
    """Refuses a Bloom whose forward pass llama.cpp does not have.

    Args:
        config: Configuration of the model.
        where: Name of the model, which opens the message.

    Raises:
        FireflyError: If it takes residuals from behind the layer norms, or leaves biases out.
    """
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise FireflyError(
            f"{where}: slow_but_exact with pretraining_tp {config.pretraining_tp} is not in llama.cpp; set it to "
            "false in config.json, as every published Bloom has it"
        )
    if config.apply_residual_connection_post_layernorm:
        raise FireflyError(
            f"{where}: apply_residual_connection_post_layernorm is not in llama.cpp; no GGUF can be made"
        )


def tensors_of(
    weights: Weights, shapes: Mapping[str, tuple[int, ...]], config: BloomConfig, where: str
) -> list[GgufTensor]:
    """The tensors of a GGUF, in the order of the model's weights.

    Args:
        weights: The weights of the model; the head only where it is not the embedding.
        shapes: Their sizes.
        config: Configuration of the model.
        where: Name of the model, which opens messages.

    Raises:
        FireflyError: If a weight is missing, or there is one that no Bloom has.
    """
    names = {name: to for name, to in _OUTER.items() if name != "lm_head.weight" or name in weights}
    for layer, part, kind in product(range(config.n_layer), _OF_BLOCK, ("weight", "bias")):
        names[f"transformer.h.{layer}.{part}.{kind}"] = f"blk.{layer}.{_OF_BLOCK[part]}.{kind}"
    for problem, others in (("lack", names.keys() - weights.keys()), ("have", weights.keys() - names.keys())):
        if others:
            raise FireflyError(
                f"{where}: the weights {problem} {some(sorted(others))}, unlike config.json; fetch both again"
            )
    tensors = []
    for name, load in weights.items():
        made = partial(_apart, load, config.n_head) if ".query_key_value." in name else load
        tensors.append(GgufTensor(names[name], name, shapes[name], made))
    return tensors


def _apart(load: Callable[[], Tensor], heads: int) -> Tensor:
    """All queries, all keys, all values, of a weight or bias that has the three of each head together."""
    stored = load()
    parts = stored.view(heads, 3, -1, *stored.shape[1:])
    return torch.cat([parts[:, kind].flatten(0, 1) for kind in range(3)])
