"""Firefly on Lightning: prune Bloom, train it on instruction rows, resume, export, chat.

Importing this package imports none of PyTorch, Lightning and transformers, which take seconds: each public name imports
what it needs when it is first asked for.
"""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from firefly_lightning.errors import FireflyError
from firefly_lightning.moved import OldNames
from firefly_lightning.strategies.registration import register_when_imported

if TYPE_CHECKING:
    from firefly_lightning import strategies
    from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
    from firefly_lightning.data.datamodule import FireflyDataModule
    from firefly_lightning.data.mixing import Source
    from firefly_lightning.data.plan import StepPlan
    from firefly_lightning.module import FireflyModule
    from firefly_lightning.preference.datamodule import PreferenceDataModule
    from firefly_lightning.preference.module import PreferenceModule
    from firefly_lightning.prompt import PromptEncoder, PromptFormat
    from firefly_lightning.strategies.hooks import StrategyHooks

__version__ = "0.1.0"

__all__ = [
    "AtomicCheckpointIO",
    "FireflyDataModule",
    "FireflyError",
    "FireflyModule",
    "PreferenceDataModule",
    "PreferenceModule",
    "PromptEncoder",
    "PromptFormat",
    "Source",
    "StepPlan",
    "StrategyHooks",
    "strategies",
]

_HOMES = {
    "AtomicCheckpointIO": "checkpoints.io_plugin",
    "FireflyDataModule": "data.datamodule",
    "FireflyModule": "module",
    "PreferenceDataModule": "preference.datamodule",
    "PreferenceModule": "preference.module",
    "PromptEncoder": "prompt",
    "PromptFormat": "prompt",
    "Source": "data.mixing",
    "StepPlan": "data.plan",
    "StrategyHooks": "strategies.hooks",
}
"""For each public name, the module of this package that defines it."""

sys.meta_path.insert(0, OldNames())
register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return import_module(f"{__name__}.strategies")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _log_to_stderr(record: logging.LogRecord) -> bool:
    """Moves DeepSpeed's log from standard output, which is for answers, to standard error, and lets each record pass.

    The log matters even where DeepSpeed is not used, since transformers imports it where it is installed.
    """
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    return True


logging.getLogger("DeepSpeed").addFilter(_log_to_stderr)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
