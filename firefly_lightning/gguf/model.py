"""A model that is to be written, and its weights, each in memory only while it is looked at."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from firefly_lightning.pruning.tensor_files import StoredTensor, open_checkpoint
from firefly_lightning.publishing.origin import Origin


class Model(NamedTuple):
    """A whole model.

    Attributes:
        where: Its name in messages.
        description: Contents of the files of its Hugging Face folder besides the weights, by name of the file.
        weights: What gives each weight, by the names of ``BloomForCausalLM``; the head where it is not the embedding.
        shapes: Sizes of the weights.
        inputs: Files, folders and hub names that it is made of, which nothing may be written into.
        origin: What is known of how it was made.
    """

    where: str
    description: Mapping[str, Any]
    weights: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: Sequence[Path | str]
    origin: Origin = Origin()


def folder_model(folder: Path, description: Mapping[str, Any], tied: bool) -> Model:
    """The model of a Hugging Face folder.

    Args:
        folder: Folder with ``.safetensors`` or ``.bin``.
        description: Contents of its other files.
        tied: Whether the head is the embedding.

    Raises:
        FireflyError: If the weights are missing or damaged.
    """
    stored = open_checkpoint(folder, tied, strict=True)
    weights = {name: partial(_read, tensor) for name, tensor in stored.items()}
    return Model(str(folder), description, weights, {name: tensor.shape for name, tensor in stored.items()}, [folder])


def _read(stored: StoredTensor) -> Tensor:
    read = np.fromfile(stored.file, np.uint8, stored.range.size, offset=stored.start)
    return torch.from_numpy(read).view(stored.torch_dtype).view(stored.shape)
