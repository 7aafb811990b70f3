"""What the contents of a checkpoint must be so that a run can go on from them; anybody may have written the file."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from firefly_lightning.checkpoints.layout import (
    ADAPTER_KEY,
    DESCRIPTION_KEY,
    FILES_KEY,
    LAST_STEP_KEY,
    NAMES_KEY,
    REFERENCE_KEY,
    RUN_KEY,
    SCALARS_KEY,
    SCALER_KEY,
    SETTINGS_KEY,
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


def check_goes_on(checkpoint: Mapping[str, Any], trainer: Any) -> None:
    """Checks that a training can go on from a checkpoint, which one of weights alone only looks like.

    Args:
        checkpoint: Contents of a checkpoint.
        trainer: The trainer that loads it, or None.

    Raises:
        FireflyError: If the checkpoint has no state of optimizer and schedule, and the trainer is to train.
    """
    if trainer is not None and trainer.state.fn == "fit" and "lr_schedulers" not in checkpoint:
        raise FireflyError(
            f"{trainer.ckpt_path}: holds weights alone (save_weights_only), so no run can be resumed from it; to train "
            "its model anew, write a folder with firefly export and name that as model.path"
        )


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
    return _of(list, dict)(value) and all(map(_is_optimizer, value))


def _is_optimizer(state: dict[str, Any]) -> bool:
    """Whether a state is one as PyTorch's optimizers have; what else an engine keeps beside it may be anything."""
    of_weights, groups = state.get("state"), state.get("param_groups", [])
    return (
        _of(dict, dict)(of_weights)
        and not any(isinstance(value, str) for kept in of_weights.values() for value in kept.values())  # type: ignore[union-attr]
        and _of(list, dict)(groups)
        and all(_of(list)(group.get("params")) for group in groups)
    )


def _are_schedules(value: Any) -> bool:
    return _of(list, dict)(value) and all(map(_is_schedule, value))


def _is_schedule(state: dict[str, Any]) -> bool:
    """Whether a state says how far a schedule is, in the terms of PyTorch's and DeepSpeed's where it uses them."""
    counts = [state[name] for name in ("last_epoch", "_step_count", "last_batch_iteration") if name in state]
    rates = [state[name] for name in ("base_lrs", "_last_lr") if name in state]
    numbers = all(
        isinstance(one, list) and all(isinstance(rate, int | float | Tensor) for rate in one) for one in rates
    )
    return bool(state) and all(type(count) is int for count in counts) and numbers


def _are_numbers(value: Any) -> bool:
    return value is None or (_of(dict)(value) and all(isinstance(one, int | float) for one in value.values()))


def _are_settings(value: Any) -> bool:
    """Whether each setting has a value by group, of which none is text."""
    if not (_of(list, dict)(value) and all(_of(dict, list)(settings) for settings in value)):
        return False
    return not any(isinstance(one, str | dict) for settings in value for of in settings.values() for one in of)


def _are_loops(value: Any) -> bool:
    return _of(dict, dict)(value) and "fit_loop" in value


def _are_scalars(value: Any) -> bool:
    return _of(dict, dict)(value) and "all" in value and _of(dict, dict)(value.get("own"))


def _is_place(value: Any) -> bool:
    return value == {} or (_of(dict)(value) and _of(dict)(value.get("plan")) and _is_count(value.get("step")))


def _is_run(value: Any) -> bool:
    """Whether a run is told by a time and the versions of its loggers, none of which leads out of a folder."""
    if not (_of(dict)(value) and type(value.get("began")) is float and _of(list, list)(value.get("logs"))):
        return False
    return all(len(log) == 2 and isinstance(log[0], str) and _is_log_version(log[1]) for log in value["logs"])


def _is_log_version(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, str) and re.search(r"[/\\\0]", value) is None and value != "..")


_CHECKS: dict[str, Check] = {
    VERSION_KEY: (_is_version, "a version"),
    "global_step": (_is_count, "a number of steps"),
    "epoch": (_is_count, "a number of epochs"),
    "state_dict": (_of(dict), "weights by name"),
    "optimizer_states": (_are_optimizers, "optimizers' states by weight"),
    "lr_schedulers": (_are_schedules, "schedules' states with counts and rates"),
    "loops": (_are_loops, "states by name with that of fit_loop"),
    "callbacks": (_of(dict, dict), "states by name"),
    DESCRIPTION_KEY: (_is_description, "files by name with fields of config.json"),
    ADAPTER_KEY: (_is_adapter, "a configuration and a base"),
    SCALER_KEY: (_of(dict), "numbers by name"),
    NAMES_KEY: (_of(list, list), "names of each optimizer's parameters"),
    SCALARS_KEY: (_are_scalars, "numbers of all parameters and of each"),
    TIED_KEY: (_of(dict, str), "names by name"),
    SETTINGS_KEY: (_are_settings, "each optimizer's settings by group"),
    LAST_STEP_KEY: (_are_numbers, "numbers by name"),
    RUN_KEY: (_is_run, "a time and the versions of logs"),
    FILES_KEY: (_of(list, str), "a list of names"),
    WRITER_KEY: (_of(dict), "settings by name"),
    REFERENCE_KEY: (_of(dict, Tensor), "log-probabilities by digest"),
    **dict.fromkeys(("FireflyDataModule", "PreferenceDataModule"), (_is_place, "the rows that come next")),
}
