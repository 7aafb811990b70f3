"""Optimizers: their schedules, settings, parameter groups and states, and those that need little memory."""

from firefly_lightning.optim.muon import MuonWithAdamW
from firefly_lightning.optim.schedule import check_counts_steps, cosine_schedule, cosine_with_warmup
from firefly_lightning.optim.settings import OptimizerSettings, RunSettings, optimizers_with_schedules

__all__ = [
    "MuonWithAdamW",
    "OptimizerSettings",
    "RunSettings",
    "check_counts_steps",
    "cosine_schedule",
    "cosine_with_warmup",
    "optimizers_with_schedules",
]
