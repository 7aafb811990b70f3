"""Bloom's weights streamed from file to file, with rows of the vocabulary gathered on the way.

What is in memory of the model, whatever its size, are the rows that stay of its embedding, those of a head that is not
tied to it, and 200 MB of buffers. Files are not mapped: their pages would count as memory of the process.
"""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from firefly_lightning.direct_io import Bytes, FileRange, read_rows, write_file
from firefly_lightning.errors import FireflyError

EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one file of several, as `transformers` 4 cuts them."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: The file.
        start: Where in the file its bytes begin; they lie there row by row.
        dtype: As `safetensors` calls it.
        shape: Its shape.
    """

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _DTYPES[self.dtype].itemsize

    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def range(self) -> FileRange:
        """Its bytes."""
        return FileRange(self.file, self.start, self.numel() * self.itemsize)


Checkpoint = dict[str, StoredTensor]
"""Tensors by the names of ``BloomForCausalLM``; ``lm_head.weight`` only where it is not the embedding again."""


def open_checkpoint(folder: Path, tied: bool) -> Checkpoint:
    """Finds the tensors of a Bloom, saved with or without ``transformer.`` before their names.

    Args:
        folder: Has ``model.safetensors`` or ``pytorch_model.bin``, in one piece or several with an index.
        tied: Whether the configuration ties the head to the embedding.

    Raises:
        FireflyError: If there are no weights, a file of them is missing or broken, or they are not a whole Bloom's.
    """
    tensors = {}
    for file in _weight_files(folder):
        for key, stored in _list_tensors(file):
            tensors[key if key == HEAD else f"transformer.{key.removeprefix('transformer.')}"] = stored
    if EMBEDDING not in tensors:
        raise FireflyError(f"{folder}: its weights hold no word_embeddings.weight; use a complete Bloom checkpoint")
    if HEAD not in tensors and not tied:
        raise FireflyError(
            f"{folder}: config.json says tie_word_embeddings is false, but the weights hold no {HEAD}; set it to true"
        )
    if tied or _same(tensors[EMBEDDING], tensors[HEAD]):
        tensors.pop(HEAD, None)
    return tensors


def count_parameters(tensors: Checkpoint, vocabulary: int) -> int:
    """Unique parameters of the model when its vocabulary has that many rows."""
    return sum(math.prod(_new_shape(name, stored, vocabulary)) for name, stored in tensors.items())


def write_checkpoint(tensors: Checkpoint, rows: Tensor, out: Path) -> None:
    """Writes the weights as `safetensors`, in several files and an index if they are many.

    Args:
        tensors: The large model's.
        rows: Row of the large vocabulary for each row of the new; ``(vocabulary,)``.
        out: Folder to write into.
    """
    shards = _split(tensors, len(rows))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    total = sum(_size(name, stored, len(rows)) for name, stored in tensors.items())
    with tqdm(desc="writing weights", total=total, unit="B", unit_scale=True, delay=2) as progress:
        for name, shard in zip(names, shards, strict=True):
            for written in write_file(out / name, _parts(shard, rows)):
                progress.update(written)
    if len(shards) > 1:
        _write_index(dict(zip(names, shards, strict=True)), len(rows), out)


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / part for part in _indexed(index)]
    raise FireflyError(f"{folder}: has no weights (model.safetensors or pytorch_model.bin); download them")


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise FireflyError(f"{index}: is no index of weights ({error}); download it again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FireflyError(f"{index.parent}: {', '.join(missing)} of {index.name} missing; download the rest")
    return names


def _list_tensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    if file.suffix != ".safetensors":
        yield from _list_bin(file)
        return
    try:
        with safe_open(file, "pt"):  # checks the sizes that the header gives
            pass
    except SafetensorError as error:
        raise FireflyError(f"{file}: is no complete safetensors file ({error}); download it again") from error
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    for key, entry in header.items():
        if key != "__metadata__":
            dtype = _known(entry["dtype"] if entry["dtype"] in _DTYPES else None, file, key)
            yield key, StoredTensor(file, 8 + size + entry["data_offsets"][0], dtype, tuple(entry["shape"]))


def _list_bin(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise FireflyError(f"{file}: is no complete PyTorch checkpoint ({reason}); download it again") from error
    base = _mapped_at(file, tensors)
    for key, tensor in tensors.items():
        dtype = _known(_DTYPE_NAMES.get(tensor.dtype), file, key)
        if not tensor.is_contiguous():
            raise FireflyError(f"{file}: {key} is a view whose rows are not one after another; save it contiguous")
        yield key, StoredTensor(file, tensor.data_ptr() - base, dtype, tuple(tensor.shape))


def _mapped_at(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Address in memory of a mapped file's first byte: its tensors are parts of an archive that is not compressed."""
    starts = []
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                opened.seek(entry.header_offset + 26)  # of the two lengths that end an entry's own header of 30 bytes
                starts.append(entry.header_offset + 30 + sum(struct.unpack("<HH", opened.read(4))))
    addresses = sorted({tensor.untyped_storage().data_ptr() for tensor in tensors.values()})
    base: int = addresses[0] - min(starts)
    if [address - base for address in addresses] != sorted(starts):
        raise FireflyError(f"{file}: holds more than the tensors of a model; save its state_dict alone")
    return base


def _known(dtype: str | None, file: Path, key: str) -> str:
    if dtype is None:
        raise FireflyError(f"{file}: {key} has a quantised type; use a checkpoint in float32, float16 or bfloat16")
    return dtype


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one[2:] != other[2:]:
        return False
    return all(np.array_equal(*pair) for pair in zip(one.range.pieces(), other.range.pieces(), strict=True))


def _new_shape(name: str, stored: StoredTensor, vocabulary: int) -> tuple[int, ...]:
    return (vocabulary, *stored.shape[1:]) if name in (EMBEDDING, HEAD) else stored.shape


def _size(name: str, stored: StoredTensor, vocabulary: int) -> int:
    return math.prod(_new_shape(name, stored, vocabulary)) * stored.itemsize


def _split(tensors: Checkpoint, vocabulary: int) -> list[Checkpoint]:
    # Widest types first: every tensor then begins at a multiple of its element size, which readers that map need.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    shards: list[Checkpoint] = [{}]
    filled = 0
    for name, stored in ordered:
        size = _size(name, stored, vocabulary)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += size
    return shards


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
        shape = _new_shape(name, stored, vocabulary)
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
