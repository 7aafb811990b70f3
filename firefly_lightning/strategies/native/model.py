"""Splits a Bloom over processes with PyTorch's own functions, and gives every process its part of the weights."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import Module, Parameter
from transformers import BloomForCausalLM

from firefly_lightning.strategies.native.dtensors import local, part_like, whole

BLOCK_PLAN: dict[str, type[ParallelStyle]] = {
    "self_attention.query_key_value": ColwiseParallel,
    "self_attention.dense": RowwiseParallel,
    "mlp.dense_h_to_4h": ColwiseParallel,
    "mlp.dense_4h_to_h": RowwiseParallel,
}
"""How tensor parallelism splits a block: attention by whole heads, the feed-forward part by its wide layer.

The second matrix of each pair ends with a sum over processes."""


def split_tensors(model: BloomForCausalLM, mesh: DeviceMesh) -> None:
    """Splits a model by tensor parallelism over a mesh of one axis; its weights need not be in memory yet.

    Embedding and head are both split along the vocabulary, which need not divide evenly: every logit is then the same
    sum as on one device.
    """
    for block in model.transformer.h:
        parallelize_module(block, mesh, {name: style() for name, style in BLOCK_PLAN.items()})
        _keep_own_heads(block.self_attention, mesh)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    _split_embedding(model.transformer.word_embeddings, mesh)
    tie(model)


def fully_shard(model: BloomForCausalLM, mesh: DeviceMesh) -> Callable[[Callable[[], Any]], Any]:
    """Applies FSDP2 block by block over a mesh of one axis, after tensor parallelism if that is used too.

    The weights need not be in memory yet.

    Returns:
        A function that calls another one as the model's forward pass: embedding, head and last norm are then whole.
        FSDP2 gathers these as one group, because embedding and head are one tensor; two groups would break the tie.
    """
    fsdp = import_module(f"torch.distributed.{'fsdp' if torch.__version__ >= '2.6' else '_composable.fsdp'}")
    for block in model.transformer.h:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    model.call_in_forward = _call
    fsdp.register_fsdp_forward_method(model, "call_in_forward")
    in_forward: Callable[[Callable[[], Any]], Any] = model.call_in_forward
    return in_forward


def tie(model: BloomForCausalLM) -> None:
    """Makes head and embedding one tensor again, since splitting a model and giving it memory make two of them."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.word_embeddings.weight


def fill(model: BloomForCausalLM, source: BloomForCausalLM | None) -> None:
    """Gives every process its part of every weight of the first process's whole model, one weight at a time.

    PyTorch's ``set_model_state_dict`` keeps all weights whole on every process until the last has come (torch 2.5).
    """
    weights = dict(source.named_parameters()) if source is not None else {}
    for name, parameter in model.named_parameters():
        dist.broadcast(weight := _whole_weight(weights.get(name), parameter), src=0)
        local(parameter.detach()).copy_(part_like(weight, parameter))


def _whole_weight(source: Parameter | None, parameter: Parameter) -> Tensor:
    if source is None:
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return source.detach().to(parameter.device, parameter.dtype).contiguous()


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _split_embedding(embedding: Any, mesh: DeviceMesh) -> None:
    """Splits the embedding by tokens: every process looks up the tokens it has, and the results are summed.

    DTensor's own look-up keeps the mask of missing tokens where a later look-up does not find it (torch 2.5).
    """
    embedding.weight = Parameter(distribute_tensor(embedding.weight.detach(), mesh, [Shard(0)]))
    first = mesh.get_local_rank() * -(-embedding.num_embeddings // mesh.size())

    def look_up(ids: Tensor) -> Tensor:
        own = local(embedding.weight)
        missing = (ids < first) | (ids >= first + len(own))
        found = F.embedding((ids - first).masked_fill(missing, 0), own).masked_fill(missing.unsqueeze(-1), 0.0)
        return whole(DTensor.from_local(found, mesh, [Partial()], run_check=False))

    embedding.forward = look_up


def _keep_own_heads(attention: Any, mesh: DeviceMesh) -> None:
    total, rank = attention.num_heads, mesh.get_local_rank()
    own = total // mesh.size()
    attention.num_heads = own

    def slice_alibi(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        alibi = kwargs["alibi"]  # (rows · heads, 1, length), of all heads
        alibi = alibi.unflatten(0, (-1, total))[:, rank * own : (rank + 1) * own].flatten(0, 1)
        return args, kwargs | {"alibi": alibi}

    attention.register_forward_pre_hook(slice_alibi, with_kwargs=True)
