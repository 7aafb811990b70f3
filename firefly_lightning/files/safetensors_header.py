"""The header of a safetensors file: 8 bytes of length, then JSON; the bytes of the tensors follow, in the same order.

The format is described at https://huggingface.co/docs/safetensors/index#format.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from firefly_lightning.files.direct_io import BLOCK

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""PyTorch's types by the names that safetensors has for them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        dtype: The tensor's type, as safetensors calls it.
        shape: The tensor's shape.
        size: Number of the tensor's bytes.
    """

    dtype: str
    shape: Sequence[int]
    size: int


def widest_first(entries: Mapping[str, Entry]) -> list[str]:
    """Names of tensors in the order in which they are best written, by the size of their elements and by name.

    Every tensor then begins at a multiple of its element size, as readers need that map the file into memory.
    """
    return sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))


def header(entries: Mapping[str, Entry], first: int | None = None) -> bytes:
    """The header of a file.

    Args:
        entries: The tensors in the order of their bytes, by name.
        first: Where in a block of the disk the first tensor is to begin, as a position in some other file; the header
            is padded for it. If None, the first tensor begins at a multiple of 8 bytes.
    """
    contents: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape, size) in entries.items():
        contents[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": (begin, begin + size)}
        begin += size
    text = json.dumps(contents, ensure_ascii=False, separators=(",", ":")).encode()
    in_blocks = first is not None and first % 8 == 0
    text += b" " * ((first - 8 - len(text)) % BLOCK if in_blocks and first is not None else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text
