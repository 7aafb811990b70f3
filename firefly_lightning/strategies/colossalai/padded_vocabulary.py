"""Pads a vocabulary with rows of zeros so that processes divide it evenly, and hides these rows again."""

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import BloomForCausalLM

NAMES = ("model.transformer.word_embeddings.weight", "model.lm_head.weight")
"""Names of the weights that have a row for each token, as they are in a ``LightningModule``."""


def pad(bloom: BloomForCausalLM, multiple: int) -> None:
    """Adds rows to embedding and head up to a multiple; the configuration keeps the true size of the vocabulary.

    Args:
        bloom: The model, not yet split.
        multiple: A divisor that the padded size must have, such as the number of processes.
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
    """Cuts logits off at the true size of the vocabulary; call it once the model is boosted and has its final head."""
    vocab_size = bloom.config.vocab_size
    bloom.lm_head.register_forward_hook(lambda head, inputs, logits: logits[..., :vocab_size])


def strip(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """A weight of a ``LightningModule``, or a tensor of its shape, without the rows that pad the vocabulary, if any."""
    return tensor[:vocab_size].clone() if name in NAMES and len(tensor) > vocab_size else tensor


def fill_up(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with rows of zeros added until it has as many rows as ``shape``."""
    return nn.functional.pad(tensor, (0, 0, 0, shape[0] - len(tensor))) if len(tensor) < shape[0] else tensor


def _padded(weight: Parameter, excess: int) -> Parameter:
    return Parameter(nn.functional.pad(weight.detach(), (0, 0, 0, excess)))
