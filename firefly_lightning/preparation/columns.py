"""Raw rows as templates want them: names of columns, values that all rows share, rows to take, tidy text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from firefly_lightning.errors import FireflyError


class Columns(NamedTuple):
    """What is done to the columns of every raw row.

    Attributes:
        rename: New names by old ones.
        constant: Texts by the name of the field that holds them in every row.
        only: Texts by the name of the column that must hold them.
    """

    rename: Mapping[str, str]
    constant: Mapping[str, str]
    only: Mapping[str, str]

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under its new names, with constants, its texts tidied."""
        renamed = {self.rename.get(name, name): tidy(value) for name, value in row.items()}
        return {**renamed, **self.constant}

    def why_not(self, row: Mapping[str, Any]) -> str | None:
        """Why a row is not to be taken, or None."""
        unlike = [f"{name} is not {text}" for name, text in self.only.items() if str(row.get(name)) != text]
        return unlike[0] if unlike else None

    def check(self, columns: Sequence[str], where: str) -> None:
        """Checks that what is renamed or chosen by is there.

        Raises:
            FireflyError: If a column is not there, or a new name is taken.
        """
        for flag, names in (("--rename", self.rename), ("--only", self.only)):
            if missing := [name for name in names if name not in columns]:
                raise FireflyError(f"{where}: {flag} names {', '.join(missing)}; the columns are {', '.join(columns)}")
        kept = [name for name in columns if name not in self.rename]
        new = [*self.rename.values(), *self.constant]
        if taken := [name for at, name in enumerate(new) if name in kept or name in new[:at]]:
            raise FireflyError(f"{where}: --rename and --constant would make {', '.join(taken)} twice; rename one away")


def read_assignments(texts: Sequence[str] | None, flag: str) -> dict[str, str]:
    """``NAME=TEXT`` by name.

    Raises:
        FireflyError: If one has no name or no ``=``, or a name is there twice.
    """
    pairs: dict[str, str] = {}
    for text in texts or []:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise FireflyError(f"{flag} {text}: must be NAME=TEXT")
        if name in pairs:
            raise FireflyError(f"{flag} {text}: {name} is there twice")
        pairs[name] = value
    return pairs


def tidy(value: Any) -> Any:
    """Texts with the line ends of Unix and no blanks at the ends of lines and of the whole, in lists too."""
    if isinstance(value, str):
        text = value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
        return re.sub(r"[^\S\n]+\n", "\n", text).strip()
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return value
