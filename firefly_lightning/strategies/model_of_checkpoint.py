"""Reads the model in a checkpoint, whichever strategy wrote it, for ``firefly export``."""

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.checkpoints.contents import DAMAGED
from firefly_lightning.checkpoints.layout import ADAPTER_KEY, DESCRIPTION_KEY, MODEL_PREFIX, WRITER_KEY
from firefly_lightning.checkpoints.own_form import read_own
from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError, reason, some
from firefly_lightning.files.model_json import check_config, check_generation_config
from firefly_lightning.huggingface import DESCRIPTION_FILES
from firefly_lightning.model.adapters import config_of, put
from firefly_lightning.strategies.catalogue import reader_of


class SavedModel(NamedTuple):
    """The model in a checkpoint.

    Attributes:
        description: Contents of the files of a Hugging Face folder besides the weights, by name of the file.
        weights: The weights by their Hugging Face names; those of the adapter alone where there is one.
        adapter: The adapter's configuration, and path and digest of its base; None where all weights were trained.
        rest: What else the checkpoint holds.
    """

    description: dict[str, Any]
    weights: dict[str, torch.Tensor]
    adapter: dict[str, Any] | None
    rest: dict[str, Any]


def read_model(path: Path) -> SavedModel:
    """The model in a checkpoint of any strategy.

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
    ours = [name for name in checkpoint["state_dict"] if isinstance(name, str) and name.startswith(MODEL_PREFIX)]
    weights = {name.removeprefix(MODEL_PREFIX): checkpoint["state_dict"][name] for name in ours}
    adapter = checkpoint.get(ADAPTER_KEY)
    _check_weights(weights, *_expected(weights, description["config.json"], adapter), path)
    del checkpoint["state_dict"]
    return SavedModel(description, weights, adapter, checkpoint)


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


def _expected(
    weights: dict[str, torch.Tensor], fields: dict[str, Any], adapter: dict[str, Any] | None
) -> tuple[dict[str, torch.Tensor], str]:
    """The weights that a checkpoint must have, without values, and what they belong to, in words.

    The head is taken from ``weights`` where it is the embedding, which is stored once.
    """
    with torch.device("meta"):
        config = BloomConfig.from_dict(fields)
        if adapter is not None:
            bloom = BloomForCausalLM(config)
            put(bloom, config_of(adapter["config"]))
            trained = ((name, weight) for name, weight in bloom.named_parameters() if weight.requires_grad)
            return dict(trained), "the adapter"
        config.n_layer = min(config.n_layer, len(weights) + 1)  # enough to see that weights are missing
        expected = BloomForCausalLM(config).state_dict()
    if fields.get("tie_word_embeddings", True):
        weights.pop("lm_head.weight", None)
        del expected["lm_head.weight"]
    return expected, "the model"


def _check_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], whose: str, path: Path) -> None:
    for problem, names in (("lacks", expected.keys() - weights.keys()), ("has", weights.keys() - expected.keys())):
        if names:
            raise FireflyError(f"{path}: {problem} {some(sorted(names))}, unlike {whose} it describes")
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            raise FireflyError(f"{path}: {name} is {type(weight).__name__}, not a tensor; {DAMAGED}")
        if weight.shape != expected[name].shape:
            sizes = f"{tuple(weight.shape)}, {whose} it describes {tuple(expected[name].shape)}"
            raise FireflyError(f"{path}: {name} has the sizes {sizes}")
