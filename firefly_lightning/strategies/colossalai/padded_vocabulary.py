"""A vocabulary that processes divide evenly: rows of zeros are added to it, and left out of whatever is shown."""

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import BloomForCausalLM

NAMES = ("model.transformer.word_embeddings.weight", "model.lm_head.weight")
"""The weights with a row for each token, as a ``LightningModule`` calls them."""


def pad(bloom: BloomForCausalLM, multiple: int) -> None:
    """Adds rows up to a multiple; the configuration keeps the true size.

    Args:
        bloom: Not yet split.
        multiple: Such as the number of processes.
    """
    excess = -bloom.config.vocab_size % multiple
    if not excess:
        return
    embedding, head = bloom.get_input_embeddings(), bloom.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = _padded(embedding.weight, excess)
    head.weight = embedding.weight if tied else _padded(head.weight, excess)
    embedding.num_embeddings = head.out_features = bloom.config.vocab_size + excess


def hide(bloom: BloomForCausalLM) -> None:
    """Ends logits where the true vocabulary does; call it once the head is the one that is used."""
    vocab_size = bloom.config.vocab_size
    bloom.lm_head.register_forward_hook(lambda head, inputs, logits: logits[..., :vocab_size])


def strip(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """A weight of a ``LightningModule``, or what is shaped like it, without the rows that were added, if any were."""
    return tensor[:vocab_size].clone() if name in NAMES and len(tensor) > vocab_size else tensor


def fill_up(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of fewer rows than ``shape`` with rows of zeros up to it."""
    return nn.functional.pad(tensor, (0, 0, 0, shape[0] - len(tensor))) if len(tensor) < shape[0] else tensor


def _padded(weight: Parameter, excess: int) -> Parameter:
    return Parameter(nn.functional.pad(weight.detach(), (0, 0, 0, excess)))
