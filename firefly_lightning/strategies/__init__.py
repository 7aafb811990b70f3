"""Strategies: how one configuration trains on one device or many. Importing this registers their short names."""

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
