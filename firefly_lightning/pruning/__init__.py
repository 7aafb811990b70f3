"""A Bloom with the vocabulary of a corpus: ``firefly prune``."""

from firefly_lightning.moved import names_of

__getattr__ = names_of(__name__)
