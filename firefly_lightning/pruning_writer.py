"""Bloom's weights copied from file to file, with rows of the vocabulary gathered on the way.

What is in memory of the model, whatever its size, are the rows that stay of its embedding, those of a head that is not
tied to it, and 300 MB of buffers.
"""

import json
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firefly_lightning.direct_io import Bytes, FileRange, read_rows, write_file
from firefly_lightning.pruning_weights import EMBEDDING, HEAD, Checkpoint, StoredTensor, pruned_shape

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one file of several, as `transformers` 4 cuts them."""


class CheckpointWriter:
    """A context that writes weights as `safetensors`, in several files and an index if they are many.

    Of many, those that do not depend on the vocabulary are copied from the beginning of the context on, while it is
    being found out which tokens stay; a context that ends early stops that.

    Args:
        tensors: The large model's.
        out: Folder to write into.
    """

    def __init__(self, tensors: Checkpoint, out: Path) -> None:
        self._out = out
        vocabulary = {name: tensors[name] for name in (EMBEDDING, HEAD) if name in tensors}
        many = sum(stored.range.size for stored in tensors.values()) > SHARD_BYTES
        self._copied = _split({name: tensors[name] for name in tensors if name not in vocabulary}) if many else []
        self._last = _widest_first(vocabulary if many else tensors)
        self._thread = ThreadPoolExecutor(1)
        self._ended = threading.Event()
        self._copying: Future[None]

    def __enter__(self) -> "CheckpointWriter":
        self._copying = self._thread.submit(self._copy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.shutdown()

    def finish(self, rows: Tensor) -> None:
        """Writes what depends on the vocabulary, and waits for the rest.

        Args:
            rows: Row of the large vocabulary for each row of the new; ``(vocabulary,)``.
        """
        self._write(len(self._copied), self._last, rows)
        self._copying.result()
        if self._copied:
            shards = [*self._copied, self._last]
            _write_index({self._name(number): shard for number, shard in enumerate(shards)}, len(rows), self._out)

    def _copy(self) -> None:
        for number, shard in enumerate(self._copied):
            self._write(number, shard, torch.empty(0, dtype=torch.int64))

    def _write(self, number: int, shard: Checkpoint, rows: Tensor) -> None:
        total = sum(_size(name, stored, len(rows)) for name, stored in shard.items())
        name = self._name(number)
        with tqdm(desc=f"writing {name}", total=total, unit="B", unit_scale=True, delay=2) as progress:
            for written in write_file(self._out / name, _parts(shard, rows)):
                progress.update(written)
                if self._ended.is_set():
                    return

    def _name(self, number: int) -> str:
        files = len(self._copied) + 1
        return f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"


def _size(name: str, stored: StoredTensor, vocabulary: int) -> int:
    return math.prod(pruned_shape(name, stored, vocabulary)) * stored.itemsize


def _split(tensors: Checkpoint) -> list[Checkpoint]:
    shards: list[Checkpoint] = [{}]
    filled = 0
    for name, stored in _widest_first(tensors).items():
        if shards[-1] and filled + stored.range.size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += stored.range.size
    return shards


def _widest_first(tensors: Checkpoint) -> Checkpoint:
    """Every tensor then begins at a multiple of its element size, which readers that map need."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def _parts(shard: Checkpoint, rows: Tensor) -> list[Bytes | FileRange]:
    """What the file of a shard consists of."""
    parts: list[Bytes | FileRange] = [np.frombuffer(_header(shard, len(rows)), np.uint8)]
    for name, stored in shard.items():
        if name in (EMBEDDING, HEAD):
            width = stored.range.size // stored.shape[0]
            parts.append(read_rows(stored.range, rows.numpy(), width).reshape(-1))
        else:
            parts.append(stored.range)
    return parts


def _header(shard: Checkpoint, vocabulary: int) -> bytes:
    """Opens a file: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors/index#format)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, stored in shard.items():
        end = begin + _size(name, stored, vocabulary)
        shape = pruned_shape(name, stored, vocabulary)
        header[name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(shards: dict[str, Checkpoint], vocabulary: int, out: Path) -> None:
    total = sum(_size(name, stored, vocabulary) for shard in shards.values() for name, stored in shard.items())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2)
    (out / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
