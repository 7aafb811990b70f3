"""Callbacks: what a run saves, writes and shows while it trains, tests or predicts."""

from firefly_lightning.moved import names_of

__getattr__ = names_of(__name__)
