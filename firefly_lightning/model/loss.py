"""The loss: cross-entropy on target tokens, and on nothing else; and log-probabilities of them, with gradients."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGIT_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Bytes of a chunk's logits in float32, by type of device; the fused loss takes a few times that.

Small chunks are faster on a CPU, in whose cache they stay; on a GPU with small chunks, adding up the head's gradient
would take longer than the matrix products.
"""

CHUNKS_TOGETHER = {("cpu", 2): 4}
"""Chunks whose logits' gradients are multiplied with the head and the hidden states at once, by type of device and
bytes of a number; 1 for all others.

A product with few rows reads the head, and adds to its gradient, as often as there are products. In float32, whole
steps were not faster for it on a CPU.
"""

FEWEST_TARGETS = 64
"""Fewest targets of a chunk, however large the vocabulary is."""

SUMMED_ROWS = 4096
"""Rows of the head's gradient to which a product in half precision is added at a time.

On a CPU, this many rows stay in the cache, and the sum takes a third of the time.
"""


class TargetScores(NamedTuple):
    """How each target was predicted.

    Attributes:
        nlls: (targets,) negative log-likelihood of each target, in nats, in float32.
        hits: (targets,) whether no token is likelier than the target.
    """

    nlls: Tensor
    hits: Tensor


def target_cross_entropy(hidden: Tensor, head: nn.Module, target_ids: Tensor) -> Tensor:
    """Summed negative log-likelihood of the targets, by calling the head as a module.

    This plain function defines what :func:`fused_target_cross_entropy` computes.

    Args:
        hidden: (targets, hidden_size) last hidden states where a target comes next.
        head: Module that maps hidden_size to the vocabulary.
        target_ids: (targets,) token ids of the targets.

    Returns:
        A scalar in float32, 0 with zero gradients where there is no target.
    """
    return F.cross_entropy(head(hidden).float(), target_ids, reduction="sum")


def target_scores(hidden: Tensor, head: nn.Module, target_ids: Tensor) -> TargetScores:
    """How each target was predicted, by calling the head as a module; arguments as for :func:`target_cross_entropy`."""
    logits = head(hidden).float()
    return TargetScores(F.cross_entropy(logits, target_ids, reduction="none"), logits.argmax(-1) == target_ids)


def embed_tied(weight: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of tokens, and the weight for a head that is tied to them.

    Used together, the two give the weight's gradient in one tensor of its size. An embedding and a head by themselves
    would each make such a tensor, and the vocabulary is most of a small model.

    Args:
        weight: (vocabulary, hidden_size) weight of the embedding.
        input_ids: (tokens,) token ids.
    """
    embedded, tied = _EmbedTied.apply(weight, input_ids)  # type: ignore[no-untyped-call]
    return embedded, tied


def fused_target_cross_entropy(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """:func:`target_cross_entropy` in little memory, for a head that is a weight alone.

    Logits exist for one chunk of targets at a time. Their gradient is computed right after them, so that no logits are
    computed twice. No gradient is computed of a head that is frozen.

    Args:
        hidden: (targets, hidden_size) last hidden states where a target comes next.
        weight: (vocabulary, hidden_size) weight of the head, which this process holds as a whole.
        target_ids: (targets,) token ids of the targets.
    """
    dtype = computing_dtype(hidden)
    loss: Tensor = _FusedTargetCrossEntropy.apply(hidden, weight, target_ids, dtype)  # type: ignore[no-untyped-call]
    return loss


def target_log_probs(hidden: Tensor, head: nn.Module, target_ids: Tensor) -> Tensor:
    """Log-probability of each target, by calling the head as a module.

    This plain function defines what :func:`fused_target_log_probs` computes.

    Args:
        hidden: (targets, hidden_size) last hidden states where a target comes next.
        head: Module that maps hidden_size to the vocabulary.
        target_ids: (targets,) token ids of the targets.

    Returns:
        (targets,) in nats, in float32; in float64 where the logits are.
    """
    scores = F.log_softmax(at_least_float32(head(hidden)), -1)
    return scores.gather(1, target_ids[:, None])[:, 0]


def fused_target_log_probs(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """:func:`target_log_probs` in little memory, for a head that is a weight alone.

    Logits exist for one chunk of targets at a time. The gradient of ``hidden`` is computed right after them, for a
    coefficient of 1, by which the backward pass scales it; logits are computed a second time only for the gradient of a
    head that learns, since that is a sum over targets whose coefficients are not known before.

    Args:
        hidden: (targets, hidden_size) last hidden states where a target comes next.
        weight: (vocabulary, hidden_size) weight of the head, which this process holds as a whole.
        target_ids: (targets,) token ids of the targets.
    """
    dtype = computing_dtype(hidden)
    found: Tensor = _FusedTargetLogProbs.apply(hidden, weight, target_ids, dtype)  # type: ignore[no-untyped-call]
    return found


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 where their own type is narrower."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def chunked_target_scores(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> TargetScores:
    """:func:`target_scores` in little memory and without gradients, for a head that is a weight alone."""
    dtype = computing_dtype(hidden)
    head, chunk = weight.to(dtype), chunk_size(len(weight), weight.device.type)
    nlls, hits = [], []
    for part, ids in zip(torch.split(hidden.to(dtype), chunk), torch.split(target_ids, chunk), strict=True):
        scores = _scores(part, head)
        nlls.append(-scores.gather(1, ids[:, None])[:, 0])
        hits.append(scores.argmax(-1) == ids)
        del scores  # or they would be in memory together with the scores of the next chunk
    return TargetScores(torch.cat(nlls), torch.cat(hits))


def computing_dtype(hidden: Tensor) -> torch.dtype:
    """The type in which products with a tensor are computed: autocast's where it is enabled, else the tensor's own."""
    device = hidden.device.type
    casts = torch.amp.autocast_mode.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else hidden.dtype


def chunk_size(vocabulary: int, device: str) -> int:
    """Number of targets whose logits exist at a time on a type of device."""
    return max(FEWEST_TARGETS, LOGIT_BYTES["cpu" if device == "cpu" else "cuda"] // (4 * vocabulary))


def group_size(vocabulary: int, device: str, itemsize: int) -> int:
    """Number of targets whose logits' gradients exist at a time on a type of device; ``itemsize`` is in bytes."""
    return chunk_size(vocabulary, device) * CHUNKS_TOGETHER.get((device, itemsize), 1)


def _scores(hidden: Tensor, head: Tensor) -> Tensor:
    return F.log_softmax((hidden @ head.t()).float(), -1)


class _EmbedTied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input_ids)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(input_ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, embedded: Tensor | None, tied: Tensor | None) -> tuple[Tensor | None, None]:
        (input_ids,) = ctx.saved_tensors
        if embedded is None:
            return tied, None
        if tied is None:
            tied = embedded.new_zeros(ctx.shape)
        # The head's gradient may be changed in place: nothing else refers to it.
        return tied.index_add_(0, input_ids, embedded.to(tied.dtype)), None


class _FusedTargetCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, dtype: torch.dtype) -> Tensor:
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        inputs, head = hidden.to(dtype), weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(inputs) if learns_hidden else None
        # The sum is at least in float32: in half precision it would lose small products.
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32)) if learns_weight else None
        chunk = chunk_size(len(weight), weight.device.type)
        together = group_size(len(weight), weight.device.type, dtype.itemsize)
        for start in range(0, len(inputs), together):
            group, ids = inputs[start : start + together], target_ids[start : start + together, None]
            learns = learns_hidden or learns_weight
            d_logits = group.new_empty((len(group), len(weight))) if learns and len(group) > chunk else None
            for at in range(0, len(group), chunk):
                scores, here = _scores(group[at : at + chunk], head), ids[at : at + chunk]
                loss -= scores.gather(1, here).sum()
                if learns:
                    of_chunk = scores.exp_().scatter_add_(1, here, scores.new_full((1, 1), -1.0).expand_as(here))
                    if d_logits is None:  # the only chunk
                        d_logits = of_chunk.to(dtype)
                    else:
                        d_logits[at : at + chunk] = of_chunk
                    del of_chunk
                del scores  # or they would be in memory together with the next ones
            if d_logits is None:
                continue
            if d_hidden is not None:
                torch.mm(d_logits, head, out=d_hidden[start : start + together])
            if d_weight is not None:
                _add_product(d_weight, d_logits.t(), group)
            del d_logits
        ctx.save_for_backward(
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scaled = None if d_hidden is None else d_hidden * scale
        return scaled, None if d_weight is None else d_weight.mul_(scale), None, None


class _FusedTargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, dtype: torch.dtype) -> Tensor:
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        inputs, head = hidden.to(dtype), weight.to(dtype)
        found = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        d_hidden = torch.empty_like(inputs) if learns_hidden else None
        chunk = chunk_size(len(weight), weight.device.type)
        for start in range(0, len(inputs), chunk):
            part, ids = inputs[start : start + chunk], target_ids[start : start + chunk, None]
            scores = F.log_softmax(at_least_float32(part @ head.t()), -1)
            found[start : start + chunk] = scores.gather(1, ids)[:, 0]
            if d_hidden is not None:
                d_logits = _of_one(scores, ids).to(dtype)
                del scores  # or they would be in memory together with the product and the next scores
                torch.mm(d_logits, head, out=d_hidden[start : start + chunk])
                del d_logits
            else:
                del scores
        of_weight = (hidden, weight, target_ids) if learns_weight else (None, None, None)
        ctx.save_for_backward(None if d_hidden is None else d_hidden.to(hidden.dtype), *of_weight)
        ctx.dtype = dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, hidden, weight, target_ids = ctx.saved_tensors
        scaled = None if d_hidden is None else (d_hidden * coefficients[:, None]).to(d_hidden.dtype)
        if weight is None:
            return scaled, None, None, None
        inputs, head = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        # The sum is at least in float32: in half precision it would lose small products.
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(ctx.dtype, torch.float32))
        chunk = chunk_size(len(weight), weight.device.type)
        for start in range(0, len(inputs), chunk):
            part, ids = inputs[start : start + chunk], target_ids[start : start + chunk, None]
            scores = F.log_softmax(at_least_float32(part @ head.t()), -1)
            d_logits = _of_one(scores, ids).mul_(coefficients[start : start + chunk, None]).to(ctx.dtype)
            del scores
            _add_product(d_weight, d_logits.t(), part)
            del d_logits
        return scaled, d_weight.to(weight.dtype), None, None


def _of_one(scores: Tensor, ids: Tensor) -> Tensor:
    """Gradient of the logits of each target for the target's log-probability; ``scores`` are overwritten."""
    return scores.exp_().neg_().scatter_add_(1, ids, scores.new_ones((1, 1)).expand_as(ids))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the product of two matrices to ``total``, in the type of ``total``; the product never exists as a whole."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for rows, part in zip(torch.split(total, SUMMED_ROWS), torch.split(left, SUMMED_ROWS), strict=True):
        rows.add_(part @ right)
