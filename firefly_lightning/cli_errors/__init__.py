"""Command-line errors in one line that names the key, and the nearest known keys."""

from firefly_lightning.cli_errors.explain import explain, known_keys
from firefly_lightning.cli_errors.nearest import alike_names, nearest
from firefly_lightning.cli_errors.parser import OneLineErrors, check_yaml
from firefly_lightning.cli_errors.refusals import Refusals, checkpoint_errors, refusals_of
from firefly_lightning.cli_errors.values import check_numbers, check_values

__all__ = [
    "OneLineErrors",
    "Refusals",
    "alike_names",
    "check_numbers",
    "check_values",
    "check_yaml",
    "checkpoint_errors",
    "explain",
    "known_keys",
    "nearest",
    "refusals_of",
]
