"""Tensors as the bytes that a file has of them, and copies of these in host memory that is kept from save to save."""

import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from firefly_lightning.files.direct_io import Bytes

CHUNK = 64 * 2**20
"""Bytes that are allocated at a time; a tensor may lie in several chunks."""


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a tensor, row by row; those of the tensor itself where it lies in host memory like that."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    bytes_: Bytes = flat.view(torch.uint8).numpy()
    return bytes_


class HostCopies:
    """Host memory for copies of tensors, so that these can be written while the tensors change.

    Memory stays allocated: a system maps fresh memory page by page, which takes longer than copying. What lies on a GPU
    is copied into pinned memory chunk by chunk, so that the copy takes no further memory of the device.
    """

    def __init__(self) -> None:
        self._chunks: dict[bool, list[Tensor]] = {False: [], True: []}
        self._used: dict[bool, int] = {False: 0, True: 0}

    def reserve(self, size: int, pinned: bool) -> None:
        """Allocates memory for so many bytes, so that copying need not; another thread may call it before copies."""
        chunks = self._chunks[pinned]
        while len(chunks) * CHUNK < size:
            chunks.append(_chunk(pinned).zero_())

    def take(self, tensor: Tensor) -> list[Bytes]:
        """Copies a tensor; returns its bytes in order, which are valid after :meth:`finish` and until :meth:`clear`."""
        source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        pieces: list[Bytes] = []
        done = 0
        while done < len(source):
            target = self._room(source.is_cuda, len(source) - done)
            target.copy_(source[done : done + len(target)], non_blocking=source.is_cuda)
            pieces.append(target.numpy())
            done += len(target)
        return pieces

    def finish(self) -> None:
        """Waits until all copies are complete."""
        if self._used[True]:
            torch.cuda.current_stream().synchronize()

    def clear(self) -> None:
        """Has the next copies take the place of those that were made."""
        self._used = {False: 0, True: 0}

    def free(self) -> None:
        """Gives the memory back to the system."""
        self._chunks = {False: [], True: []}
        self.clear()

    def _room(self, pinned: bool, wanted: int) -> Tensor:
        """Memory for as many bytes as are wanted, or for fewer where a chunk ends."""
        chunks = self._chunks[pinned]
        number, offset = divmod(self._used[pinned], CHUNK)
        if number == len(chunks):
            chunks.append(_chunk(pinned))
        room = chunks[number][offset : offset + wanted]
        self._used[pinned] += len(room)
        return room


def _chunk(pinned: bool) -> Tensor:
    """Memory of a chunk, which the system is asked to map in pages of 2 MiB."""
    if pinned:
        return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, CHUNK)
    with suppress(OSError, AttributeError):  # a system that has no such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))
