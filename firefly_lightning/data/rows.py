"""Instruction rows from files and Hugging Face datasets, whatever of three forms they are in."""

import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from firefly_lightning.data.prompt import Turn
from firefly_lightning.errors import FireflyError, describe_os_error

TURN_SEPARATOR = "</s>"
"""What parts the later turns inside the ``target`` of a published Firefly row."""

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


class Row(NamedTuple):
    """One instruction row.

    Attributes:
        kind: The task, as in the published data; ``Belle`` or ``Conversation`` where the source names none.
        turns: (input, target) pairs, at least one, no target empty.
        number: Line in a ``.jsonl`` file, else position in the source; from 1.
        unanswered: Whether a last turn without an answer was left out.
    """

    kind: str
    turns: tuple[Turn, ...]
    number: int
    unanswered: bool = False


def find_sources(patterns: Iterable[str]) -> list[str]:
    """Files named by paths and globs, in order; names of Hugging Face datasets stay as they are.

    Raises:
        FireflyError: If a path or a glob meets no file.
    """
    sources: list[str] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            sources.append(str(path))
        elif any(character in pattern for character in "*?["):
            # Path.glob wants a relative pattern and a root; a user's pattern may be absolute.
            matches = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
            if not matches:
                raise FireflyError(f"{pattern}: no file matches; check the pattern and the working folder")
            sources += matches
        elif path.suffix in FILE_SUFFIXES or not (path.is_dir() or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", pattern)):
            raise FireflyError(f"{pattern}: no such file; check the path and the working folder")
        else:
            sources.append(str(path) if path.is_dir() else pattern)
    return sources


def is_file(source: str) -> bool:
    """Whether a source is a file, rather than a dataset of the Hugging Face hub."""
    return Path(source).is_file()


def read_rows(source: str) -> Iterator[Row]:
    """Streams the rows of one file (``.jsonl``, ``.json``, ``.parquet``) or dataset.

    The form is recognised from the fields of the first row: Firefly ``{"kind","input","target"}``, Belle
    ``{"instruction","input","output"}``, or ``{"conversation":[{"human","assistant"},…]}``.

    Raises:
        FireflyError: If the source is empty, is in none of the forms, or a row is malformed; with file and line.
    """
    parse: Callable[[Mapping[str, Any], str, int], Row] | None = None
    for number, fields in read_records(source):
        where = f"{source}:{number}"
        parse = parse or _recognise(fields, where)
        yield parse(fields, where, number)
    if parse is None:
        raise FireflyError(f"{source}: has no rows; remove it from the list or fill it")


def read_records(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (number, fields) of one file or dataset, as they stand.

    Raises:
        FireflyError: If the source cannot be read or a row is not an object; with file and line.
    """
    try:
        for number, fields in _read(source):
            if not isinstance(fields, dict):
                raise FireflyError(
                    f"{source}:{number}: a row must be a JSON object, this is {type(fields).__name__}; mend the line"
                )
            yield number, fields
    except OSError as error:
        raise FireflyError(describe_os_error(error, source)) from error


def load_hub_dataset(name: str) -> Any:
    """The train split of a dataset of the Hugging Face hub or of a folder.

    Raises:
        FireflyError: If ``datasets`` cannot load it.
    """
    try:
        import datasets

        return datasets.load_dataset(name, split="train")
    except Exception as error:
        raise FireflyError(f"{name}: neither a file nor a dataset that could be loaded ({error})") from error


def _read(source: str) -> Iterator[tuple[int, Any]]:
    if not is_file(source):
        return enumerate(load_hub_dataset(source), 1)
    if source.endswith(".parquet"):
        return _read_parquet(source)
    if source.endswith(".json") and _first_character(source) == b"[":
        return _read_json_array(source)
    return _read_json_lines(source)


def _recognise(fields: Mapping[str, Any], where: str) -> Callable[[Mapping[str, Any], str, int], Row]:
    for required, parse in _FORMS:
        if required <= fields.keys():
            return parse
    raise FireflyError(
        f"{where}: fields {sorted(fields)} are none of the accepted forms; use {{kind, input, target}}, "
        "{instruction, input, output} or {conversation: [{human, assistant}, …]}"
    )


def _parse_firefly(fields: Mapping[str, Any], where: str, number: int) -> Row:
    kind = _text(fields, "kind", where)
    pieces = [_text(fields, "input", where), *_text(fields, "target", where).split(TURN_SEPARATOR)]
    while len(pieces) > 2 and not pieces[-1].strip():
        pieces.pop()  # a closing </s> written out, or nothing after it
    unanswered = len(pieces) % 2 == 1
    turns = tuple(zip(pieces[0::2], pieces[1::2], strict=False))
    return _row(kind, turns, where, number, unanswered)


def _parse_belle(fields: Mapping[str, Any], where: str, number: int) -> Row:
    parts = [_text(fields, "instruction", where), _text(fields, "input", where)]
    question = "\n".join(part for part in parts if part)
    return _row(_kind(fields, "Belle"), ((question, _text(fields, "output", where)),), where, number)


def _parse_conversation(fields: Mapping[str, Any], where: str, number: int) -> Row:
    conversation = fields["conversation"]
    if not isinstance(conversation, list) or not conversation:
        raise FireflyError(f"{where}: 'conversation' must be a list of at least one {{human, assistant}}")
    turns = []
    for index, turn in enumerate(conversation, 1):
        if not isinstance(turn, dict):
            raise FireflyError(f"{where}: turn {index} of 'conversation' must be an object with human and assistant")
        turn_where = f"{where}, turn {index}"
        turns.append((_text(turn, "human", turn_where), _text(turn, "assistant", turn_where)))
    return _row(_kind(fields, "Conversation"), tuple(turns), where, number)


_FORMS: tuple[tuple[set[str], Callable[[Mapping[str, Any], str, int], Row]], ...] = (
    ({"kind", "input", "target"}, _parse_firefly),
    ({"instruction", "input", "output"}, _parse_belle),
    ({"conversation"}, _parse_conversation),
)


def _row(kind: str, turns: tuple[Turn, ...], where: str, number: int, unanswered: bool = False) -> Row:
    for index, (_, target) in enumerate(turns, 1):
        if not target.strip():
            turn = f" of turn {index}" if len(turns) > 1 else ""
            raise FireflyError(f"{where}: the target{turn} is empty, so there is nothing to learn; remove the row")
    return Row(kind, turns, number, unanswered)


def _kind(fields: Mapping[str, Any], default: str) -> str:
    kind = fields.get("kind", default)
    return kind if isinstance(kind, str) and kind else default


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise FireflyError(f"{where}: field {name!r} is missing; the row has {sorted(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise FireflyError(f"{where}: field {name!r} must be a string, this is {type(value).__name__}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise FireflyError(f"{where}: field {name!r} holds half a surrogate pair, which is no character; mend it")
    return value


def _first_character(source: str) -> bytes:
    with Path(source).open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_json_lines(source: str) -> Iterator[tuple[int, Any]]:
    with Path(source).open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, source, number)
            if text.strip():
                yield number, _load_json(text, source, number)


def _read_json_array(source: str) -> Iterator[tuple[int, Any]]:
    content = Path(source).read_bytes().removeprefix(b"\xef\xbb\xbf")
    yield from enumerate(_load_json(_decode(content, source, 1), source, 1), 1)


def _decode(content: bytes, source: str, first_line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise FireflyError(
            f"{source}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file, "
            "for example with: iconv -f GB18030 -t UTF-8"
        ) from error


def _load_json(text: str, source: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise FireflyError(f"{source}:{line}: not JSON, {error.msg} at column {error.colno}; mend the line") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise FireflyError(f"{source}:{first_line}: not a row, {error}; mend the line") from error


def _read_parquet(source: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield number, fields
    except pyarrow.ArrowException as error:
        raise FireflyError(f"{source}: not a readable Parquet file ({error})") from error
