"""What the contents of a checkpoint must be so that a run can go on from them; anybody may have written the file."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from firefly_lightning.checkpoints.layout import (
    ADAPTER_KEY,
    DESCRIPTION_KEY,
    FILES_KEY,
    NAMES_KEY,
    SCALARS_KEY,
    SCALER_KEY,
    TIED_KEY,
    VERSION_KEY,
    WRITER_KEY,
)
from firefly_lightning.errors import FireflyError

DAMAGED = "use an earlier checkpoint"
"""What to do about a checkpoint that is damaged."""

OF_A_RUN = (VERSION_KEY, "global_step")
"""Keys that every checkpoint of a run has."""

Check = tuple[Callable[[Any], bool], str]
"""Whether a value can be used, and what it must be, in words."""


def check_contents(checkpoint: Mapping[str, Any], path: Path, required: Collection[str] = ()) -> None:
    """Checks, key by key, what a run would go on from; the configuration is only shown, and may be anything.

    Args:
        checkpoint: Contents of a checkpoint of one file, or of ``trainer.ckpt``.
        path: The file, which opens the message.
        required: Keys that must be there.

    Raises:
        FireflyError: If something is missing or of another kind than a run saves.
    """
    if missing := [key for key in required if key not in checkpoint]:
        raise FireflyError(f"{path}: lacks {missing[0]}; {DAMAGED}")
    for key, (usable, words) in _CHECKS.items():
        if key in checkpoint and not usable(checkpoint[key]):
            raise FireflyError(f"{path}: its {key} is {type(checkpoint[key]).__name__}, not {words}; {DAMAGED}")


_VERSION = r"\d+(\.\d+)*(\.?(a|b|rc|dev|post)\d+)*(\+[a-z\d.]+)?"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(_VERSION, value) is not None


def _of(kind: type, values: type | None = None) -> Callable[[Any], bool]:
    """Whether something is a dictionary or list; with ``values``, whether all that it holds is of that type."""

    def usable(value: Any) -> bool:
        held = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and (values is None or all(isinstance(one, values) for one in held))

    return usable


def _is_description(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("config.json", {}), dict)


def _is_adapter(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return False
    base = value.get("base")
    return isinstance(base, dict) and _of(dict, str)(base) and {"path", "xxh3_128"} <= base.keys()


def _are_optimizers(value: Any) -> bool:
    return _of(list, dict)(value) and all(isinstance(one.get("state"), dict) for one in value)


def _are_loops(value: Any) -> bool:
    return _of(dict, dict)(value) and "fit_loop" in value


def _are_scalars(value: Any) -> bool:
    return _of(dict, dict)(value) and "all" in value and _of(dict, dict)(value.get("own"))


def _is_place(value: Any) -> bool:
    return value == {} or (_of(dict)(value) and _of(dict)(value.get("plan")) and _is_count(value.get("step")))


_CHECKS: dict[str, Check] = {
    VERSION_KEY: (_is_version, "a version"),
    "global_step": (_is_count, "a number of steps"),
    "epoch": (_is_count, "a number of epochs"),
    "state_dict": (_of(dict), "weights by name"),
    "optimizer_states": (_are_optimizers, "a list of states"),
    "lr_schedulers": (_of(list, dict), "a list of states"),
    "loops": (_are_loops, "states by name with that of fit_loop"),
    "callbacks": (_of(dict, dict), "states by name"),
    DESCRIPTION_KEY: (_is_description, "files by name with fields of config.json"),
    ADAPTER_KEY: (_is_adapter, "a configuration and a base"),
    SCALER_KEY: (_of(dict), "numbers by name"),
    NAMES_KEY: (_of(list, list), "names of each optimizer's parameters"),
    SCALARS_KEY: (_are_scalars, "numbers of all parameters and of each"),
    TIED_KEY: (_of(dict, str), "names by name"),
    FILES_KEY: (_of(list, str), "a list of names"),
    WRITER_KEY: (_of(dict), "settings by name"),
    "FireflyDataModule": (_is_place, "the rows that come next"),
}
