"""The places of Bloom's weights: which files hold which tensors, and where in the files.

Files are not read by mapping them into memory, since their pages would count as memory of the process.
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

from firefly_lightning.checkpoints.torch_file import how_to_save_anew, is_legacy
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.direct_io import FileRange
from firefly_lightning.files.model_json import read_index
from firefly_lightning.files.safetensors_header import DTYPES, NAMES

EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        key: The tensor's name in the file, with or without ``transformer.`` before it.
        file: The file that holds the tensor.
        start: Where in the file the tensor's bytes begin; they lie there row by row.
        dtype: The tensor's type, as `safetensors` calls it.
        shape: The tensor's shape.
    """

    key: str
    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The tensor's type, as PyTorch has it."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def range(self) -> FileRange:
        """The range of the file that holds the tensor's bytes."""
        return FileRange(self.file, self.start, self.numel() * self.itemsize)


Checkpoint = dict[str, StoredTensor]
"""Tensors by the names of ``BloomForCausalLM``; ``lm_head.weight`` only where it differs from the embedding."""


def open_checkpoint(folder: Path, tied: bool, strict: bool = False) -> Checkpoint:
    """Finds the tensors of a Bloom, saved with or without ``transformer.`` before their names.

    Args:
        folder: Folder with ``model.safetensors`` or ``pytorch_model.bin``, in one piece or several with an index.
        tied: Whether the configuration ties the head to the embedding.
        strict: Whether a head is refused that is another than the embedding which the configuration ties it to.

    Raises:
        FireflyError: If there are no weights, a file of them is missing or broken, or they are not a whole Bloom's.
    """
    tensors = {}
    for file in _weight_files(folder):
        for stored in _list_tensors(file):
            key = stored.key
            tensors[key if key == HEAD else f"transformer.{key.removeprefix('transformer.')}"] = stored
    if EMBEDDING not in tensors:
        raise FireflyError(f"{folder}: its weights hold no word_embeddings.weight; use a complete Bloom checkpoint")
    if HEAD not in tensors and not tied:
        raise FireflyError(
            f"{folder}: config.json says tie_word_embeddings is false, but the weights hold no {HEAD}; set it to true"
        )
    if strict and tied and HEAD in tensors and not _same(tensors[EMBEDDING], tensors[HEAD]):
        raise FireflyError(
            f"{folder}: config.json says tie_word_embeddings is true, but the weights hold another {HEAD}; set it false"
        )
    if tied or _same(tensors[EMBEDDING], tensors[HEAD]):
        tensors.pop(HEAD, None)
    return tensors


def count_parameters(tensors: Checkpoint, vocabulary: int) -> int:
    """Number of unique parameters of the model when its vocabulary has ``vocabulary`` rows."""
    return sum(math.prod(pruned_shape(name, stored, vocabulary)) for name, stored in tensors.items())


def pruned_shape(name: str, stored: StoredTensor, vocabulary: int) -> tuple[int, ...]:
    """Shape of a tensor when the model's vocabulary has ``vocabulary`` rows."""
    return (vocabulary, *stored.shape[1:]) if name in (EMBEDDING, HEAD) else stored.shape


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / part for part in read_index(index)]
    raise FireflyError(f"{folder}: has no weights (model.safetensors or pytorch_model.bin); download them")


def _list_tensors(file: Path) -> Iterator[StoredTensor]:
    if file.suffix != ".safetensors":
        yield from _list_bin(file)
        return
    with file.open("rb") as opened:
        try:
            with safe_open(file, "pt"):  # checks the sizes that the header gives
                pass
        except SafetensorError as error:
            raise FireflyError(f"{file}: is no complete safetensors file ({error}); download it again") from error
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    for key, entry in header.items():
        if key != "__metadata__":
            dtype = _known(entry["dtype"] if entry["dtype"] in DTYPES else None, file, key)
            yield StoredTensor(key, file, 8 + size + entry["data_offsets"][0], dtype, tuple(entry["shape"]))


def _list_bin(file: Path) -> Iterator[StoredTensor]:
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if is_legacy(file):
            raise FireflyError(f"{file}: {how_to_save_anew(file)}") from error
        reason = str(error).partition("\n")[0]
        raise FireflyError(f"{file}: is no complete PyTorch checkpoint ({reason}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise FireflyError(f"{file}: holds more than the tensors of a model; save its state_dict alone")
    base = _mapped_at(file, tensors)
    for key, tensor in tensors.items():
        dtype = _known(NAMES.get(tensor.dtype), file, key)
        if not tensor.is_contiguous():
            raise FireflyError(f"{file}: {key} is a view whose rows are not one after another; save it contiguous")
        yield StoredTensor(key, file, tensor.data_ptr() - base, dtype, tuple(tensor.shape))


def _mapped_at(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Address in memory of the first byte of a mapped file, found from the addresses of its tensors.

    The file is an archive that is not compressed, of which the tensors are parts.
    """
    starts = []
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                opened.seek(entry.header_offset + 26)  # two lengths end an entry's own header of 30 bytes
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
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(np.array_equal(*pair) for pair in zip(one.range.pieces(), other.range.pieces(), strict=True))
