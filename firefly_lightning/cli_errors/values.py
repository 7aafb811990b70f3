"""Values that no key accepts, refused before anything is made of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from firefly_lightning.errors import FireflyError, check_number

RANGES: dict[str, tuple[float | None, float | None, float | None]] = {
    # least, most, above
    "seed_everything": (0, 2**32 - 1, None),
    "trainer.val_check_interval": (None, 10**12, 0),
    "trainer.check_val_every_n_epoch": (1, None, None),
    "trainer.max_steps": (-1, None, None),
    "trainer.min_steps": (0, None, None),
    "trainer.max_epochs": (-1, None, None),
    "trainer.min_epochs": (0, None, None),
    "trainer.num_nodes": (1, None, None),
    "trainer.accumulate_grad_batches": (1, None, None),
    "trainer.log_every_n_steps": (0, None, None),
    "trainer.num_sanity_val_steps": (-1, None, None),
    "trainer.gradient_clip_val": (0, None, None),
    "trainer.reload_dataloaders_every_n_epochs": (0, None, None),
}
"""Numbers that Lightning fails on late, or with words that do not name the key."""


def check_values(arguments: Iterable[str]) -> None:
    """Checks that no flag of a command line has an empty value, as an unset variable of the shell gives it.

    Raises:
        FireflyError: If one has.
    """
    flag = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            flag = name
        if argument == "" or (argument.startswith("--") and equals and value == ""):
            raise FireflyError(f"{flag or 'the command line'}: the value is empty; give one, or leave the flag out")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Checks the numbers of a run whose keys are Lightning's.

    Args:
        settings: Values by the dotted names of their keys; a value that is no number is left to Lightning.

    Raises:
        FireflyError: If a number is out of its range.
    """
    for name, (least, most, above) in RANGES.items():
        value = settings.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(name, value, least, most, above)
