"""What a run writes and shows beside training."""

from firefly_lightning.moved import names_of

__getattr__ = names_of(__name__)
