"""Reads a configuration as ``firefly-fit`` reads it, without building or loading anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from firefly_lightning.cli import make_parser
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import load_config
from firefly_lightning.planning.runs import STRATEGIES, ModelSize
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
