"""Tensors that processes hold in parts (DTensor): taking a part, joining parts, and norms over mixed tensors."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

AXES = ("data_parallel", "tensor_parallel")
"""Axes of the mesh of processes, as Lightning names them; ranks count along the last axis first."""

Split = list[tuple[int, int]]
"""Pairs of a mesh axis and the dimension that it splits; each splits what the pairs before it have left of a tensor."""


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, put together from the parts of all processes, which call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_of(tensor: Tensor) -> Split:
    """How a tensor is split: FSDP2, the outer axis, splits what tensor parallelism has left of it."""
    if not isinstance(tensor, DTensor):
        return []
    names = tensor.device_mesh.mesh_dim_names or ()
    found = ((AXES.index(name), placement) for name, placement in zip(names, tensor.placements, strict=True))
    return [(axis, placement.dim) for axis, placement in reversed(list(found)) if hasattr(placement, "dim")]


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, a view of it, split as ``like`` is; no communication."""
    for axis, dim in split_of(like):
        mesh = like.device_mesh[AXES[axis]]  # type: ignore[attr-defined]
        chunks, rank = tensor.chunk(mesh.size(), dim), mesh.get_local_rank()
        tensor = chunks[rank] if rank < len(chunks) else tensor.narrow(dim, 0, 0)
    return tensor


def with_parts(part: Tensor, like: Tensor) -> Tensor:
    """The tensor that is split as ``like`` is and of which every process gives its ``part``."""
    part = part.to(like.device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def join(parts: Sequence[Tensor], split: Split, mesh: Sequence[int]) -> Tensor:
    """A whole tensor from its parts.

    Args:
        parts: The tensor's parts, one of each rank.
        split: How the tensor is split, as :func:`split_of` gives it.
        mesh: Sizes of the axes of the mesh.
    """

    def joined(place: tuple[int, int], remaining: Split) -> Tensor:
        if not remaining:
            return parts[place[0] * mesh[1] + place[1]]
        (axis, dim), *inner = remaining
        places = [(index, place[1]) if axis == 0 else (place[0], index) for index in range(mesh[axis])]
        return torch.cat([joined(at, inner) for at in places], dim)

    return joined((0, 0), split)


def norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of all tensors together, of which processes hold some in parts and some whole, in one reduction.

    PyTorch's own function refuses such a mixture, and makes a reduction for each tensor.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        square = torch.linalg.vector_norm(local(tensor), dtype=torch.float32).double().square()
        total += square / _copies(tensor)
    dist.all_reduce(total)
    return total.sqrt().float()


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a tensor."""
    copies = dist.get_world_size()
    for axis, _ in split_of(tensor):
        copies //= tensor.device_mesh[AXES[axis]].size()  # type: ignore[attr-defined]
    return copies
