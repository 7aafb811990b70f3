"""Strategies: how one configuration trains on one device or many.

Importing this package makes their short names known to Lightning. Their classes are imported when they are asked for.
"""

from typing import TYPE_CHECKING, Any

from firefly_lightning.strategies.catalogue import CLASS_PATHS
from firefly_lightning.strategies.registration import load_class, register_when_imported

if TYPE_CHECKING:
    from firefly_lightning.strategies.colossalai.strategy import GeminiStrategy, TensorParallelStrategy
    from firefly_lightning.strategies.deepspeed.strategy import ZeroStrategy
    from firefly_lightning.strategies.native.strategy import FSDP2Strategy, NativeTensorParallelStrategy

__all__ = [
    "FSDP2Strategy",
    "GeminiStrategy",
    "NativeTensorParallelStrategy",
    "TensorParallelStrategy",
    "ZeroStrategy",
]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in CLASS_PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, load_class(CLASS_PATHS[name]))


def __dir__() -> list[str]:
    return sorted({*globals(), *CLASS_PATHS})
