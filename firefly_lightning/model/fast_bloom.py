"""A fast, exact forward pass for Hugging Face's Bloom: only what the loss needs is computed.

The rows of a micro-batch are computed one after another, without padding between them. Attention is PyTorch's fused
kernel, with ALiBi as one bias that all rows share. The last block computes only the positions that are followed by a
target, once attention is done. Weights, names and hooks are those of the stock model, whose own forward pass still
serves all other calls.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.data.batches import MicroBatch
from firefly_lightning.errors import FireflyError
from firefly_lightning.model.attention import AlibiBias, Attend, PackedRows, Packing, attend_within, attention_forward
from firefly_lightning.model.loss import (
    TargetScores,
    chunked_target_scores,
    computing_dtype,
    embed_tied,
    fused_target_cross_entropy,
    fused_target_log_probs,
    target_cross_entropy,
    target_log_probs,
    target_scores,
)
from firefly_lightning.model.low_rank import apply


class Keeping(NamedTuple):
    """Which tensors of a block autograd does not keep, since the backward pass can quickly compute them again.

    A block that is recomputed as a whole keeps all of them: what is needed to compute a tensor again would otherwise be
    kept in addition to the block's input.

    Attributes:
        spares: Whether GELU's output and the joined contexts of attention are not kept, and the float32 copies that
            16-bit attention makes on a CPU are kept in 16 bits.
        spares_norms: Whether the outputs of layer norms are not kept; the backward pass must then find the weights of
            the norms unchanged.
    """

    spares: bool = False
    spares_norms: bool = False


KEEPING_ALL = Keeping()

FEW_ROWS = 64
"""Most rows whose product with the head is computed from the other side where answers are generated."""


def takes_fast_pass(attention: str, config: BloomConfig) -> bool:
    """Whether a model is computed by :class:`FastBloom`, and not by Hugging Face's own forward pass.

    With ``slow_but_exact`` Hugging Face sums the parts that the processes of pretraining had, and leaves out biases.

    Args:
        attention: ``sdpa``, ``eager`` or ``auto``.
        config: Configuration of the model.

    Raises:
        FireflyError: If it is ``sdpa``, and the configuration asks for what only Hugging Face's own pass computes.
    """
    in_parts = config.slow_but_exact and config.pretraining_tp > 1
    if in_parts and attention == "sdpa":
        raise FireflyError(
            f"config.json: slow_but_exact with pretraining_tp {config.pretraining_tp} is computed by Hugging Face's "
            "own pass only; set model.attention to eager or auto"
        )
    return attention != "eager" and not in_parts


class FastBloom:
    """Computes a Bloom: its loss on the targets of a micro-batch, and logits where answers are generated.

    Args:
        model: The stock model; its blocks are changed so that they take packed rows as well.
        heads: The attention heads that this process computes; all by default.
        whole_weights: Whether this process holds every weight as a whole, all the time; then embedding and head need
            not be called as modules, and the loss takes less memory and time.
    """

    def __init__(self, model: BloomForCausalLM, heads: slice = slice(None), whole_weights: bool = True) -> None:
        self._model, self._whole_weights = model, whole_weights
        self._bias = AlibiBias(model.config.n_head, heads)
        for block in model.transformer.h:
            block.forward = partial(_block_forward, block, block.forward)
            attention = block.self_attention
            attention.forward = partial(attention_forward, block, attention, attention.forward)

    def target_loss(self, batch: MicroBatch) -> Tensor:
        """Summed negative log-likelihood of a micro-batch's targets, a scalar in float32."""
        hidden, weight = self._hidden_and_head(*_packed(batch))
        if weight is None:
            return target_cross_entropy(hidden, self._model.lm_head, batch["target_ids"])
        return fused_target_cross_entropy(hidden, weight, batch["target_ids"])

    def target_scores(self, batch: MicroBatch) -> TargetScores:
        """How each target of a micro-batch was predicted, without gradients."""
        hidden, weight = self._hidden_and_head(*_packed(batch))
        if weight is None:
            return target_scores(hidden, self._model.lm_head, batch["target_ids"])
        return chunked_target_scores(hidden, weight, batch["target_ids"])

    def target_log_probs(self, batch: MicroBatch, packed: tuple[Tensor, Packing] | None = None) -> Tensor:
        """Log-probability of each target of a micro-batch, (targets,) in float32, with gradients.

        Args:
            batch: The micro-batch.
            packed: (tokens,) ids of the tokens to compute and how they lie, with targets in the order of the
                micro-batch's; its rows one after another by default.
        """
        hidden, weight = self._hidden_and_head(*(packed or _packed(batch)))
        if weight is None:
            return target_log_probs(hidden, self._model.lm_head, batch["target_ids"])
        return fused_target_log_probs(hidden, weight, batch["target_ids"])

    @property
    def heads(self) -> int:
        """Number of attention heads of the whole model."""
        heads: int = self._model.config.n_head
        return heads

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = self._model.transformer.word_embeddings.weight.device
        return device

    def logits(self, input_ids: Tensor, attend: Attend, only: Tensor | None = None) -> Tensor:
        """What the head gives for some of packed tokens, (those, vocab_size).

        Args:
            input_ids: (tokens,) their ids.
            attend: What computes attention among these tokens, and others that it knows.
            only: (those,) which tokens the head is computed for; all by default.
        """
        hidden = self._blocks(self._model.transformer.word_embeddings(input_ids), attend, only, KEEPING_ALL)
        head = self._model.lm_head
        if self._whole_weights and type(head) is nn.Linear and not head._forward_hooks and _is_faster_turned(hidden):
            return (head.weight @ hidden.t()).t()
        logits: Tensor = head(hidden)
        return logits

    def _hidden_and_head(self, input_ids: Tensor, rows: Packing) -> tuple[Tensor, Tensor | None]:
        """Last hidden states, (targets, hidden_size), and the head's weight; None if the head must be called."""
        embedding, head = self._model.transformer.word_embeddings, self._model.lm_head
        if not (self._whole_weights and type(embedding) is nn.Embedding and type(head) is nn.Linear):
            return self._hidden(embedding(input_ids), rows), None
        if head.weight is embedding.weight:
            embedded, weight = embed_tied(embedding.weight, input_ids)
        else:
            embedded, weight = embedding(input_ids), head.weight
        return self._hidden(embedded, rows), weight

    def _hidden(self, embedded: Tensor, rows: Packing) -> Tensor:
        """Last hidden states, (targets, hidden_size), computed from word embeddings, (tokens, hidden_size)."""
        transformer = self._model.transformer
        recomputed = bool(getattr(transformer, "gradient_checkpointing", False)) and transformer.training
        keeping = Keeping(spares=not recomputed, spares_norms=not recomputed and self._whole_weights)
        attend = partial(attend_within, rows=rows, bias=self._bias, spares=keeping.spares)
        return self._blocks(embedded, attend, rows.targets, keeping, recomputed)

    def _blocks(
        self, embedded: Tensor, attend: Attend, only: Tensor | None, keeping: Keeping, recomputed: bool = False
    ) -> Tensor:
        """Last hidden states, (taken or all tokens, hidden_size), from word embeddings, (tokens, hidden_size)."""
        transformer = self._model.transformer
        hidden = transformer.word_embeddings_layernorm(embedded)
        *blocks, last = transformer.h
        for block, taken in (*((block, None) for block in blocks), (last, only)):
            recompute = recomputed and not _recomputes(block)
            hidden = block(hidden, attend=attend, only=taken, keeping=keeping, recompute=recompute)
        output: Tensor = transformer.ln_f(hidden)
        return output


def _packed(batch: MicroBatch) -> tuple[Tensor, Packing]:
    """The tokens of a micro-batch's rows, one row after another."""
    positions = batch["token_positions"]
    input_ids = batch["input_ids"].flatten().index_select(0, positions)
    return input_ids, PackedRows(batch["lengths"], positions, batch["packed_targets"])


def _is_faster_turned(hidden: Tensor) -> bool:
    """Whether a few rows, (rows, hidden_size), times a large matrix are computed faster as the matrix times columns.

    On processors MKL has half its pace or less for such rows in float32, of two to some tens of them.
    """
    casts = torch.is_autocast_enabled(hidden.device.type)
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32 and not casts and 1 < len(hidden) <= FEW_ROWS


def _recomputes(block: nn.Module) -> bool:
    """Whether calling a block recomputes its activations, as in some releases of transformers 5.

    Other releases recompute around the block, or in the forward method of its class, which :class:`FastBloom` replaces.
    """
    return type(block).__call__ is not nn.Module.__call__


def _block_forward(
    block: Any,
    stock: Any,
    hidden: Tensor,
    *args: Any,
    attend: Attend | None = None,
    only: Tensor | None = None,
    keeping: Keeping = KEEPING_ALL,
    recompute: bool = False,
    **kwargs: Any,
) -> Any:
    """The forward pass of a block: over packed rows where ``attend`` is given, else Hugging Face's own.

    Args:
        block: The stock block.
        stock: The block's own forward pass.
        hidden: (tokens, hidden_size) hidden states of packed rows.
        args: Further arguments of the block's own forward pass.
        attend: What computes attention.
        only: (targets,) which tokens are computed after attention; all by default.
        keeping: Which tensors are not kept for the backward pass.
        recompute: Whether the backward pass computes activations again; hooks of the block run once nevertheless.
        kwargs: Further keyword arguments of the block's own forward pass.
    """
    if attend is None:
        return stock(hidden, *args, **kwargs)
    if recompute:
        return checkpoint(_packed_forward, block, hidden, attend, only, keeping, use_reentrant=False)
    return _packed_forward(block, hidden, attend, only, keeping)


def _packed_forward(block: Any, hidden: Tensor, attend: Attend, only: Tensor | None, keeping: Keeping) -> Tensor:
    attention, mlp, dropout = block.self_attention, block.mlp, partial(_dropout, block)

    def normed_into(layer: nn.Module, norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = norm(hidden)
        given = normed.to(computing_dtype(normed))  # autocast would cast it too, but out of sight of _fed
        spares = keeping.spares_norms and type(norm) is nn.LayerNorm  # an adapter may have put another in its place
        again = partial(_norm_again, norm, hidden, given.dtype) if spares else None
        return _fed(layer, given, again), normed if block.apply_residual_connection_post_layernorm else hidden

    fused, residual = normed_into(attention.query_key_value, block.input_layernorm, hidden)
    contexts, join = attend(attention, fused)
    if only is None:
        context = _fed(attention.dense, join(contexts), partial(join, contexts) if keeping.spares else None)
    else:
        context, residual = apply(attention.dense, join(contexts).index_select(0, only)), residual.index_select(0, only)
    hidden = residual + dropout(context)
    wide, residual = normed_into(mlp.dense_h_to_4h, block.post_attention_layernorm, hidden)
    output: Tensor = residual + dropout(
        _fed(mlp.dense_4h_to_h, _gelu(wide), partial(_gelu, wide) if keeping.spares else None)
    )
    return output


def _fed(layer: nn.Module, given: Tensor, again: Callable[[], Tensor] | None) -> Tensor:
    """The output of a layer; where ``again`` can make its input again, the input is not kept for the backward pass."""
    if again is None:
        return apply(layer, given)
    number = id(given)  # a hook that knew the tensor itself would keep it
    with saved_tensors_hooks(
        lambda saved: None if id(saved) == number else saved,
        lambda saved: again() if saved is None else saved,
    ):
        output = apply(layer, given)
    return output


def _norm_again(norm: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)


def _gelu(inputs: Tensor) -> Tensor:
    return F.gelu(inputs, approximate="tanh")


def _dropout(block: Any, hidden: Tensor) -> Tensor:
    rate = block.mlp.hidden_dropout
    return F.dropout(hidden, rate) if block.training and rate else hidden
