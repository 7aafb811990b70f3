"""Where a model comes from, as far as a checkpoint says."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from firefly_lightning.checkpoints.history import HISTORY, History
from firefly_lightning.checkpoints.layout import ADAPTER_KEY, CONFIGURATION_KEY, REFERENCE_KEY
from firefly_lightning.errors import FireflyError

_OF_A_MACHINE = ("path", "tokenizer", "cache_dir", "num_workers", "pin_memory", "_files")
"""Endings of the names of settings that say where a run was and what it had, not what it did."""

_OF_THE_TRAINER = (
    "accumulate_grad_batches", "devices", "gradient_clip_algorithm", "gradient_clip_val", "max_epochs", "max_steps",
    "num_nodes", "precision", "strategy",
)  # fmt: skip
"""Those of Lightning's settings that a model depends on."""


class Origin(NamedTuple):
    """What is known of a model.

    Attributes:
        base: Hub name, or name of the folder, of the model that the run began with; empty where it is not known.
        from_scratch: Whether it began with random weights.
        adapter: The adapter's configuration by the names of peft's fields; None where all weights were trained.
        steps: Number of optimizer steps.
        settings: The settings of the run that are not empty, by name.
        history: What else the run tells; None where its checkpoint has nothing of the kind.
        of_pairs: Whether the run learned which of two answers is preferred.
    """

    base: str = ""
    from_scratch: bool = False
    adapter: Mapping[str, Any] | None = None
    steps: int = 0
    settings: Mapping[str, str] = {}
    history: History | None = None
    of_pairs: bool = False


def origin_of(checkpoint: Mapping[str, Any]) -> Origin:
    """What a checkpoint says of the run that saved it.

    Args:
        checkpoint: Its contents besides the tensors.
    """
    settings = dict(_settings(checkpoint))
    try:
        history = History.of(checkpoint["callbacks"][HISTORY])
    except (KeyError, TypeError, FireflyError):
        history = None  # weights alone, a run without the callback, or none of ours
    adapter = checkpoint.get(ADAPTER_KEY)
    return Origin(
        base=history.base if history else Path(str(settings.get("model.path", ""))).name,
        from_scratch=settings.get("model.from_scratch") in (True, "true"),
        adapter=adapter["config"] if adapter else None,
        steps=checkpoint.get("global_step", 0),
        settings={name: str(value) for name, value in settings.items() if not name.endswith(_OF_A_MACHINE)},
        history=history,
        of_pairs=REFERENCE_KEY in checkpoint,
    )


def _settings(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of the run that are not empty: of its configuration, or of the arguments of its module."""
    try:
        read = yaml.safe_load(checkpoint[CONFIGURATION_KEY])
        trainer = {name: value for name, value in read["trainer"].items() if name in _OF_THE_TRAINER}
        told = ("model", "data", "optimizer", "lr_scheduler", "seed_everything")
        given = {name: read[name] for name in told if name in read} | {"trainer": trainer}
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        given = {"model": checkpoint.get("hyper_parameters") or {}}
    yield from _leaves(given, "")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "class_path" and name in ("model", "data"):
                continue
            own = name if key == "init_args" else f"{name}.{key}".removeprefix(".")
            yield from _leaves(inner, own)
    elif value not in (None, [], "") and value is not False:
        yield name, value
