"""Firefly on Lightning: prune Bloom, train it on instruction rows, resume, export, chat."""

__version__ = "0.1.0"
