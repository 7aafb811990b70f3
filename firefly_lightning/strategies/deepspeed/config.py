"""Makes a DeepSpeed configuration agree with the plan of steps and the trainer, and checks it before loading."""

import json
import os
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.json_object import read_json_object

AUTO = "auto"
"""A value in files written for Hugging Face's trainer, which puts its own value in the place of it."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed configuration from a JSON file.

    Raises:
        FireflyError: If there is no such file, or it holds no JSON object.
    """
    return read_json_object(Path(path).expanduser(), "mend the DeepSpeed configuration")


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration without ``auto`` values; an optimizer or scheduler with one is left out as a whole."""
    left = {name for name in ("optimizer", "scheduler") if AUTO in json.dumps(config.get(name))}
    return _without_auto({name: value for name, value in config.items() if name not in left})


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if value != AUTO}
    return {name: _without_auto(value) if isinstance(value, dict) else value for name, value in kept.items()}


def settle(config: dict[str, Any], name: str, value: Any, whose: str) -> None:
    """Sets a value of a configuration that is decided elsewhere.

    Args:
        config: The configuration to complete.
        name: The key to set.
        value: The value that it must have.
        whose: What decides the value, for the message of the error.

    Raises:
        FireflyError: If the configuration has another value for the key.
    """
    if config.setdefault(name, value) != value:
        raise FireflyError(
            f"the DeepSpeed configuration has {name} {config[name]}, {whose} {value}; leave it out there"
        )


def settle_precision(config: dict[str, Any], precision: str) -> None:
    """Completes the sections ``fp16`` and ``bf16`` of a configuration; Lightning adds those that are missing.

    Raises:
        FireflyError: If they contradict ``trainer.precision``.
    """
    wanted = {"bf16": precision.startswith("bf16"), "fp16": precision.startswith("16")}
    for name, enabled in wanted.items():
        section = config.get(name)
        if section is not None and section.setdefault("enabled", enabled) != enabled:
            raise FireflyError(
                f"the DeepSpeed configuration has {name} enabled {section['enabled']}, "
                f"but trainer.precision is {precision}; make them agree"
            )


def check_zero(config: dict[str, Any]) -> None:
    """Refuses a stage of ZeRO or a kind of offloading that DeepSpeed does not have.

    Raises:
        FireflyError: If the configuration asks for such a stage or kind of offloading.
    """
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise FireflyError(f"ZeRO has the stages 1, 2 and 3, not {stage}; take ddp to shard nothing")
    for name in ("offload_optimizer", "offload_param"):
        device = device_of(zero, name)
        if device not in ("none", "cpu", "nvme"):
            raise FireflyError(f"{name}: there is no device {device}; name cpu or nvme")
        if stage < 3 and (device == "nvme" or (name == "offload_param" and device != "none")):
            raise FireflyError(f"{name} to {device} needs stage 3, this is stage {stage}; take zero3_offload")
        if device == "nvme":
            _check_nvme_path(name, zero[name].get("nvme_path"))


def device_of(zero: dict[str, Any], name: str) -> str:
    """The device that ``offload_optimizer`` or ``offload_param`` moves tensors to; ``none`` where it is off."""
    return str((zero.get(name) or {}).get("device", "none"))


def _check_nvme_path(name: str, path: str | None) -> None:
    if not path or not Path(path).is_dir() or not os.access(path, os.W_OK):
        raise FireflyError(f"{name}: nvme_path {path} is no folder to write to; name one on a fast disk")
