"""Copies Bloom's weights from file to file, and gathers the kept rows of the vocabulary on the way.

Whatever the size of the model, no more of it is in memory than the kept rows of its embedding, the kept rows of a head
that is not tied to the embedding, and 300 MB of buffers. A model of many files keeps its division into files, so that
what does not change can share the disk with the large model: as one and the same file where the user asks for links, as
blocks where the file system shares them.
"""

import json
import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.direct_io import Bytes, FileRange, read_rows, write_file
from firefly_lightning.files.safetensors_header import Entry, header
from firefly_lightning.pruning.tensor_files import EMBEDDING, HEAD, Checkpoint, StoredTensor, pruned_shape

ONE_FILE_BYTES = 5_000_000_000
"""A model whose tensors have at most this many bytes is written as one file, as `transformers` 4 does."""


class CheckpointWriter:
    """A context manager that writes weights as `safetensors`; large models get several files and an index.

    Of several files, the last holds the tensors that depend on the vocabulary; each of the others holds the other
    tensors of one file of the large model. The others are copied from the beginning of the context on, while it is
    being found out which tokens stay; a context that ends early stops copying. Tensors keep the names that they have
    in the large model's files.

    Args:
        tensors: Tensors of the large model.
        out: Folder to write into.
        link: Whether a file in which nothing changes is given a second name instead of being copied.

    Attributes:
        linked: Files of the large model that got a second name, by this name.

    Raises:
        FireflyError: If files are to be linked, but something changes in all of them, or one cannot be linked.
    """

    def __init__(self, tensors: Checkpoint, out: Path, link: bool = False) -> None:
        self._out = out
        vocabulary = {name: tensors[name] for name in (EMBEDDING, HEAD) if name in tensors}
        rest = {name: tensors[name] for name in tensors if name not in vocabulary}
        files = {stored.file for stored in tensors.values()}
        many = len(files) > 1 or sum(stored.range.size for stored in tensors.values()) > ONE_FILE_BYTES
        self._copied = _by_file(rest) if many else []
        self._last = _widest_first(vocabulary if many else tensors)
        whole = {self._name(number): _whole_file(shard) for number, shard in enumerate(self._copied) if link}
        self.linked = {name: file for name, file in whole.items() if file}
        if link and not self.linked:
            raise FireflyError(
                f"--link: every file of {min(files).parent} holds rows of the vocabulary or is no .safetensors file; "
                "leave --link out"
            )
        self._thread = ThreadPoolExecutor(1)
        self._ended = threading.Event()
        self._copying: Future[None]

    def __enter__(self) -> "CheckpointWriter":
        for name, file in self.linked.items():
            try:
                os.link(file.resolve(), self._out / name)  # the file itself: a hub cache has a link in its place
            except OSError as error:
                raise FireflyError(
                    f"--link: {file} cannot be linked into the new folder ({error.strerror}); leave --link out"
                ) from error
        self._copying = self._thread.submit(self._copy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.shutdown()

    def finish(self, rows: Tensor) -> None:
        """Writes the tensors that depend on the vocabulary, and waits until the others are written.

        Args:
            rows: Row of the large vocabulary for each row of the new one; ``(vocabulary,)``.
        """
        self._write(len(self._copied), self._last, rows)
        self._copying.result()
        if self._copied:
            shards = [*self._copied, self._last]
            _write_index({self._name(number): shard for number, shard in enumerate(shards)}, len(rows), self._out)

    def _copy(self) -> None:
        for number, shard in enumerate(self._copied):
            if self._name(number) not in self.linked:
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


def _by_file(tensors: Checkpoint) -> list[Checkpoint]:
    shards: dict[Path, Checkpoint] = {}
    for name, stored in tensors.items():
        shards.setdefault(stored.file, {})[name] = stored
    return [_widest_first(shard) for shard in shards.values()]


def _widest_first(tensors: Checkpoint) -> Checkpoint:
    """Sorts tensors by the size of their elements, the widest first, and then as they lie.

    Every tensor then begins at a multiple of its element size, as readers need that map the file into memory.
    """
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[1].file, item[1].start)))


def _whole_file(shard: Checkpoint) -> Path | None:
    """The `safetensors` file that holds the tensors of a shard and nothing else, or None if there is none."""
    file = next(iter(shard.values())).file
    if file.suffix != ".safetensors":
        return None
    with file.open("rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
    return file if header + sum(stored.range.size for stored in shard.values()) == file.stat().st_size else None


def _parts(shard: Checkpoint, rows: Tensor) -> list[Bytes | FileRange]:
    """The parts of a shard's new file in order; tensors that lie one after another in the old file are one range."""
    parts: list[Bytes | FileRange] = [np.frombuffer(_header(shard, len(rows)), np.uint8)]
    for name, stored in shard.items():
        before = parts[-1]
        if name in (EMBEDDING, HEAD):
            width = stored.range.size // stored.shape[0]
            parts.append(read_rows(stored.range, rows.numpy(), width).reshape(-1))
        elif isinstance(before, FileRange) and (before.file, before.start + before.size) == stored.range[:2]:
            parts[-1] = before._replace(size=before.size + stored.range.size)
        else:
            parts.append(stored.range)
    return parts


def _header(shard: Checkpoint, vocabulary: int) -> bytes:
    """The header, padded so that the first tensor is as far from the beginning of a block as in the old file.

    The file system can then share blocks.
    """
    entries = {
        stored.key: Entry(stored.dtype, pruned_shape(name, stored, vocabulary), _size(name, stored, vocabulary))
        for name, stored in shard.items()
    }
    return header(entries, next(iter(shard.values())).start)


def _write_index(shards: dict[str, Checkpoint], vocabulary: int, out: Path) -> None:
    total = sum(_size(name, stored, vocabulary) for shard in shards.values() for name, stored in shard.items())
    weight_map = {stored.key: file for file, shard in shards.items() for stored in shard.values()}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2)
    (out / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
