"""Brings raw rows into the form that templates want: names of columns, shared values, rows to take, tidy text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from firefly_lightning.errors import FireflyError, shown, some


class Columns(NamedTuple):
    """What is done to the columns of every raw row.

    Attributes:
        rename: New names of columns by old ones.
        constant: Texts by the name of the field that holds them in every row.
        only: Texts by the name of the column that must hold them.
    """

    rename: Mapping[str, str]
    constant: Mapping[str, str]
    only: Mapping[str, str]

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its columns renamed, the constants added and its texts tidied."""
        renamed = {self.rename.get(name, name): tidy(value) for name, value in row.items()}
        return {**renamed, **self.constant}

    def why_not(self, row: Mapping[str, Any]) -> str | None:
        """Why a row is not to be taken, or None if it is."""
        unlike = [f"{name} is not {text}" for name, text in self.only.items() if str(row.get(name)) != text]
        return unlike[0] if unlike else None

    def check(self, columns: Sequence[str], where: str) -> None:
        """Checks that the columns are there that are renamed, or that rows are chosen by.

        Raises:
            FireflyError: If such a column is not there, or a new name is taken.
        """
        for flag, names in (("--rename", self.rename), ("--only", self.only)):
            if missing := [name for name in names if name not in columns]:
                raise FireflyError(
                    f"{where}: {flag} names {', '.join(missing)}; the columns are {some(list(map(shown, columns)), 12)}"
                )
        kept = [name for name in columns if name not in self.rename]
        new = [*self.rename.values(), *self.constant]
        if taken := [name for at, name in enumerate(new) if name in kept or name in new[:at]]:
            raise FireflyError(f"{where}: --rename and --constant would make {', '.join(taken)} twice; rename one away")


def read_assignments(texts: Sequence[str] | None, flag: str) -> dict[str, str]:
    """Reads texts of the form ``NAME=TEXT``; gives each TEXT by its NAME.

    Raises:
        FireflyError: If a text is not of this form, or a name is there twice.
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
    """A value with its texts, in lists too, tidied: Unix line ends, no blanks at ends of lines or around the text."""
    if isinstance(value, str):
        text = value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
        return _BLANKS_AT_END.sub("\n", text).strip() if "\n" in text else text.strip()
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return value


_BLANKS_AT_END = re.compile(r"[^\S\n]+\n")
