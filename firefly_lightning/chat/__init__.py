"""A conversation with a model: ``firefly chat``."""

from firefly_lightning.moved import names_of

__getattr__ = names_of(__name__)
