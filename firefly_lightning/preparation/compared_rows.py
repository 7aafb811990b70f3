"""Rows that ``firefly clean`` compares a row with: those kept so far, and those of the validation."""

import json
from array import array
from collections.abc import Iterable
from typing import Any, BinaryIO

from firefly_lightning.preparation.duplicates import DuplicateIndex, Texts, normalise, sign
from firefly_lightning.preparation.row_checks import texts_of, turns_of


class KeptRows:
    """The rows written so far, of which only places and hashes are in memory.

    Args:
        file: File into which rows are written, and from which they are read again to be compared with.
        threshold: Jaccard similarity from which on two rows are near duplicates.
    """

    def __init__(self, file: BinaryIO, threshold: float) -> None:
        self.file = file
        self.index = DuplicateIndex(threshold, self._reread)
        self._starts, self._wheres = array("Q"), array("Q")
        self._sources: list[str] = []

    def add(self, line: bytes, where: str, signature: Any) -> None:
        """Writes the line of a row, and remembers the row's place and signature."""
        source, _, number = where.rpartition(":")
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        self._wheres.append((len(self._sources) - 1) << 40 | int(number))
        self._starts.append(self.file.seek(0, 2))
        self.file.write(line)
        self.index.add(len(self._starts) - 1, signature)

    def where(self, key: int) -> str:
        """The file and line from which the row of a key was read."""
        place = self._wheres[key]
        return f"{self._sources[place >> 40]}:{place & (1 << 40) - 1}"

    def is_last(self, key: int, where: str) -> bool:
        """Whether a row was the last one kept so far, and of the same file as ``where``."""
        return key == len(self._starts) - 1 and self._sources[-1] == where.rpartition(":")[0]

    def _reread(self, key: int) -> Texts:
        self.file.seek(self._starts[key])
        return texts_of(json.loads(self.file.readline()))


class ValidationRows:
    """Rows that must not be trained on; they are few, so all of them are in memory.

    Args:
        rows: Each with its file and line.
        threshold: Jaccard similarity from which on two rows are near duplicates.
    """

    def __init__(self, rows: Iterable[tuple[str, dict[str, Any]]], threshold: float) -> None:
        self.index = DuplicateIndex(threshold, lambda key: self._texts[key])
        self._texts: list[Texts] = []
        self._wheres: list[str] = []
        self._questions: dict[str, int] = {}
        for where, row in rows:
            texts = texts_of(row)
            self.index.add(len(self._texts), sign(texts.whole))
            if question := _question(row):
                self._questions.setdefault(question, len(self._texts))
            self._texts.append(texts)
            self._wheres.append(where)

    def find(self, row: dict[str, Any], texts: Texts, signature: Any) -> str | None:
        """The file and line of the validation row that a row repeats, or None."""
        if not self.index.size:
            return None
        if (asked := self._questions.get(_question(row))) is not None:
            return self._wheres[asked]
        duplicate = self.index.find(texts, signature)
        return self._wheres[duplicate.key] if duplicate else None


def _question(row: dict[str, Any]) -> str:
    """What a row asks first, as it is compared; nothing for a document or a raw row."""
    return next((normalise(question) for question, _ in turns_of(row)[:1]), "")
