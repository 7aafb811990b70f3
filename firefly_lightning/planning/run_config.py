"""Reads a configuration as ``firefly-fit`` reads it, without building or loading anything."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.cli import make_parser
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import load_config
from firefly_lightning.model.adapters import check_adapter, put
from firefly_lightning.module import FireflyModule
from firefly_lightning.planning.optimizers import Shapes, cost_of
from firefly_lightning.planning.runs import STRATEGIES, ModelSize, Trained
from firefly_lightning.strategies.catalogue import name_of


def read_fit(arguments: Sequence[str]) -> Any:
    """Reads the configuration that ``firefly-fit fit`` has with these arguments.

    Raises:
        FireflyError: If a key or a value is wrong.
    """
    return make_parser().parse_args(["fit", *arguments])["fit"]


def model_size(path: str) -> ModelSize:
    """Reads the sizes of a model.

    Args:
        path: Folder, ``config.json`` or hub name of the model.

    Raises:
        FireflyError: If there is no such model.
    """
    file = Path(path).expanduser()
    try:
        return ModelSize.of(load_config(str(file.parent if file.name == "config.json" else path)))
    except FireflyError as error:
        raise FireflyError(
            f"{error}; a model that is not here is planned by --vocab_size, --hidden_size, --n_layer and --n_head"
        ) from error


def trained_of(model: Any, size: ModelSize, precision: str) -> Trained:
    """What a configuration trains, and by which optimizer, found without loading the model.

    Args:
        model: The part of the configuration that describes the module; one that is not this project's trains all
            weights by AdamW.
        size: Sizes of the model.
        precision: Lightning's name of the precision.

    Raises:
        FireflyError: If the adapter does not fit the model, or the optimizer cannot be made.
    """
    asked = {name: model.init_args.get(name) for name in ("adapter", "quantize", "optimizer", "release_gradients")}
    if not any(asked.values()):
        return Trained()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FireflyModule, "model", fail_untyped=False)
    known = {"path": ".", **{name: value for name, value in asked.items() if value}}
    made: Any = parser.instantiate_classes(parser.parse_object({"model": known})).model
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    optimizer = cost_of(made.optimizer, dtype) if made.optimizer else None
    adapter = adapter_shapes(size, made.adapter) if asked["adapter"] else None
    return Trained(optimizer, adapter, asked["quantize"], bool(asked["release_gradients"]))


def adapter_shapes(size: ModelSize, adapter: Any) -> Shapes:
    """How many weights of each shape an adapter has in a model of these sizes.

    Args:
        size: Sizes of the model.
        adapter: The adapter as :func:`firefly_lightning.model.adapters.as_config` gives it.

    Raises:
        FireflyError: If the adapter does not fit the model.
    """
    sizes = {name: getattr(size, name) for name in ("vocab_size", "hidden_size", "n_layer", "n_head")}
    config = BloomConfig(**sizes, tie_word_embeddings=size.tied)
    check_adapter(adapter, config)
    with torch.device("meta"):
        bloom = BloomForCausalLM(config)
    put(bloom, adapter)
    return Counter(tuple(weight.shape) for weight in bloom.parameters() if weight.requires_grad)


def devices_of(trainer: Any) -> int:
    """Number of processes of a run; a trainer that takes all devices is counted with those of this machine."""
    devices = trainer.devices
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = torch.cuda.device_count() if trainer.accelerator != "cpu" else 1
    else:
        count = int(devices) if str(devices).isdigit() else len(str(devices).strip("[]").split(","))
    return max(count, 1) * int(trainer.num_nodes)


def strategy_of(trainer: Any, devices: int) -> str:
    """The short name of a run's strategy.

    Raises:
        FireflyError: If the strategy cannot be planned.
    """
    given = trainer.strategy
    name = given if isinstance(given, str) else name_of(given.class_path, dict(given.get("init_args") or {}))
    if name == "auto" and devices > 1:
        return "ddp"
    if name not in STRATEGIES:
        raise FireflyError(f"trainer.strategy {name} cannot be planned; there are {', '.join(STRATEGIES)}")
    return name
