"""Reads the model in a checkpoint, whichever strategy wrote it, for ``firefly export``."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.checkpoints.contents import DAMAGED
from firefly_lightning.checkpoints.layout import DESCRIPTION_KEY, MODEL_PREFIX, WRITER_KEY
from firefly_lightning.checkpoints.own_form import read_own
from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError, reason, some
from firefly_lightning.files.model_json import check_config, check_generation_config
from firefly_lightning.huggingface import DESCRIPTION_FILES
from firefly_lightning.strategies.catalogue import reader_of


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description of a checkpoint's model, and its weights by their Hugging Face names.

    Args:
        path: The checkpoint, a file or a folder.

    Raises:
        FireflyError: If the checkpoint is damaged or not one of this project's, or if its weights do not fit the model
            that it describes.
    """
    checkpoint = _read_folder(path) if path.is_dir() else load_file(path, "cpu")
    missing = [key for key in ("state_dict", DESCRIPTION_KEY) if not isinstance(checkpoint.get(key), dict)]
    missing = missing or [name for name in DESCRIPTION_FILES if name not in checkpoint[DESCRIPTION_KEY]]
    if missing:
        raise FireflyError(f"{path}: not a checkpoint of firefly_lightning; it has no {', '.join(missing)}")
    description = checkpoint[DESCRIPTION_KEY]
    _check_description(description, path)
    return description, _bloom_weights(checkpoint["state_dict"], description["config.json"], path)


def _read_folder(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint that is a folder, of any strategy, into the form that Lightning's own files have."""
    if PortableReader.is_at(folder):
        reader = PortableReader(folder)
        return reader.trainer() | {"state_dict": {name: reader.weight(name) for name in reader.names()}}
    trainer = read_own(folder)
    engine = trainer.get(WRITER_KEY, {}).get("engine")
    module = reader_of(engine)
    if module is None:
        raise FireflyError(f"{folder}: was written by an unknown engine {engine}; export it where it was trained")
    read_weights = import_module(module).read_weights
    try:
        return trainer | {"state_dict": read_weights(folder, trainer)}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise FireflyError(f"{folder}: is not what {engine} saves ({reason(error)}); {DAMAGED}") from error


def _check_description(description: dict[str, Any], path: Path) -> None:
    for name in DESCRIPTION_FILES:
        kind = str if name == "tokenizer.json" else dict
        if not isinstance(value := description[name], kind):
            raise FireflyError(f"{path}: its {name} is {type(value).__name__}, not {kind.__name__}; {DAMAGED}")
    check_config(description["config.json"], f"{path}, config.json")
    check_generation_config(description["generation_config.json"], f"{path}, generation_config.json")


def _bloom_weights(state_dict: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    ours = [name for name in state_dict if isinstance(name, str) and name.startswith(MODEL_PREFIX)]
    weights = {name.removeprefix(MODEL_PREFIX): state_dict[name] for name in ours}
    with torch.device("meta"):
        described = BloomConfig.from_dict(config)
        described.n_layer = min(described.n_layer, len(weights) + 1)  # enough to see that weights are missing
        expected = BloomForCausalLM(described).state_dict()
    if config.get("tie_word_embeddings", True):  # the head is the embedding, and is stored once
        weights.pop("lm_head.weight", None)
        del expected["lm_head.weight"]
    for problem, names in (("lacks", expected.keys() - weights.keys()), ("has", weights.keys() - expected.keys())):
        if names:
            raise FireflyError(f"{path}: {problem} {some(sorted(names))}, unlike the model it describes")
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            raise FireflyError(f"{path}: {name} is {type(weight).__name__}, not a tensor; {DAMAGED}")
        if weight.shape != expected[name].shape:
            sizes = f"{tuple(weight.shape)}, the model it describes {tuple(expected[name].shape)}"
            raise FireflyError(f"{path}: {name} has the sizes {sizes}")
    return weights
