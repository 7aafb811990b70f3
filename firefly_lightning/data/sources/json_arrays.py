"""Reads the rows of a JSON array one at a time: ``json`` itself would hold the whole file in memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from firefly_lightning.data.sources.text_files import TextFile, not_encoded, open_text
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.json_object import STRICT_JSON

BLOCK = 1 << 20
"""Number of bytes that are read at a time."""

_CUT = 16
"""Characters before the end of the text read so far in which a mistake may be a literal, number or escape cut there."""

DEEPEST = 100
"""How deep lists and objects of a row may lie in one another; rows of real data have fewer than ten levels."""


def not_json(source: str, line: int, column: int, message: str) -> FireflyError:
    """The error for a text that is not JSON."""
    return FireflyError(f"{source}:{line}: not JSON, {message} at column {column}; mend the line")


def checked_depth(value: Any, brackets: int, source: str, line: int) -> Any:
    """The value that was read, unless it is nested so deeply that other code would fail on it.

    Args:
        value: The value.
        brackets: Number of opening brackets in its text: where they are few, the value need not be looked at.
        source: Name of the file.
        line: Number of the line.

    Raises:
        FireflyError: If it is nested more than ``DEEPEST`` deep.
    """
    level = [value] if brackets > DEEPEST else []
    for _ in range(DEEPEST if level else 0):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for many in inner for one in many]
    if any(isinstance(one, dict | list) for one in level):
        raise FireflyError(f"{source}:{line}: not a row, nested more than {DEEPEST} deep; mend the line")
    return value


def read_json_array(source: str) -> Iterator[tuple[int, Any]]:
    """Streams (number, row) of a file ``[row, row, …]``; only a block and the longest row are in memory.

    Raises:
        FireflyError: If the file is not JSON in UTF-8; the message names the line.
    """
    with open_text(source) as file:
        window = _Window(file, source)
        window.skip("[")
        number = 0
        while number or window.peek() != "]":
            number += 1
            yield number, window.value()
            if window.peek() == "]":
                break
            window.skip(",")
        window.skip("]")
        if window.peek():
            raise window.error("Extra data")


class _Window:
    """The text of a file from the place that reading has reached to the end of what was read in."""

    def __init__(self, file: TextFile, source: str) -> None:
        self.file, self.source = file.bytes, source
        self.bytes_to_text = codecs.getincrementaldecoder(file.encoding)()
        self.json = STRICT_JSON
        self.text, self.at, self.line, self.column = "", 0, 1, 1
        self.ended = False

    def peek(self) -> str:
        """The next character that is no blank; an empty string at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self._read_on():
                return self.text[self.at : self.at + 1]

    def skip(self, character: str) -> None:
        """Passes over a character, which must come next."""
        if self.peek() != character:
            raise self.error(f"Expecting '{character}'")
        self.at += 1

    def value(self) -> Any:
        """The next JSON value, which is passed over."""
        self.peek()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not (error.pos >= len(self.text) - _CUT or error.msg.startswith("Unterminated")):
                    self.at = error.pos
                    raise self.error(error.msg) from error
            except (RecursionError, ValueError) as error:  # nested too deeply, thousands of digits, or a key twice
                raise FireflyError(f"{self.source}:{self._place()[0]}: not a row, {error}; mend the line") from error
            else:
                if self.ended or end < len(self.text):
                    brackets = self.text.count("[", self.at, end) + self.text.count("{", self.at, end)
                    if brackets > DEEPEST:
                        checked_depth(value, brackets, self.source, self._place()[0])
                    self.at = end
                    return value
            self._read_on()

    def error(self, message: str) -> FireflyError:
        """The error for a mistake at the place that was reached."""
        return not_json(self.source, *self._place(), message)

    def _read_on(self) -> bool:
        """Reads one more block and forgets the text that was passed; false at the end of the file."""
        if self.ended:
            return False
        self.line, self.column = self._place()
        self.text, self.at = self.text[self.at :], 0
        block = self.file.read(BLOCK)
        self.ended = not block
        try:
            self.text += self.bytes_to_text.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise not_encoded(self.source, line, error) from error
        return not self.ended

    def _place(self) -> tuple[int, int]:
        passed = self.text[: self.at]
        lines = passed.count("\n")
        column = len(passed) - passed.rfind("\n") if lines else self.column + len(passed)
        return self.line + lines, column
