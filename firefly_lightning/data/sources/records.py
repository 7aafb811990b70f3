"""Reads records of files and Hugging Face datasets one at a time, whatever they hold, and says where a mistake is."""

import codecs
import csv
import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from firefly_lightning.data.sources.json_arrays import checked_depth, not_json, read_json_array
from firefly_lightning.data.sources.text_files import format_of, is_compressed, open_text, read_lines
from firefly_lightning.errors import FireflyError, describe_os_error, reason, some
from firefly_lightning.files.hub import NOT_ASKED, hub_problem, patiently
from firefly_lightning.files.json_object import read_json

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""What a file of rows is called; it may be compressed, as in ``rows.jsonl.gz``."""

DocumentPer = Literal["line", "file"]
"""What of a ``.txt`` file is a document: each ``line`` that is not blank, or the whole ``file``."""


def find_sources(patterns: Iterable[str]) -> list[str]:
    """Files named by paths and globs, in order; names of Hugging Face datasets stay as they are.

    Raises:
        FireflyError: If a path or a glob matches no file.
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
        elif format_of(pattern) in FILE_SUFFIXES or not (
            path.is_dir() or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", pattern)
        ):
            raise FireflyError(f"{pattern}: no such file; check the path and the working folder")
        else:
            sources.append(str(path) if path.is_dir() else pattern)
    return sources


def is_file(source: str) -> bool:
    """Whether a source is a file, rather than a dataset of the Hugging Face hub."""
    return Path(source).is_file()


def identify_source(source: str) -> list[Any]:
    """A value that changes when a source changes, found without reading the source."""
    if is_file(source):
        status = Path(source).stat()
        return [str(Path(source).resolve()), status.st_size, status.st_mtime_ns]
    return [source, load_hub_dataset(source)._fingerprint]


def read_records(source: str, document_per: DocumentPer = "line") -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (number, fields) of the records of one file or dataset, unchanged; of a ``.txt`` file, its documents.

    Raises:
        FireflyError: If the source cannot be read or a row is not an object; the message names file and line.
    """
    try:
        yield from _objects(source, _read(source, document_per))
    except OSError as error:
        raise FireflyError(describe_os_error(error, source)) from error


def load_hub_dataset(name: str) -> Any:
    """The train split of a dataset of the Hugging Face hub or of a folder.

    Raises:
        FireflyError: If the library ``datasets`` cannot load the dataset.
    """
    try:
        import datasets

        return patiently(lambda: datasets.load_dataset(name, split="train"))
    except Exception as error:
        told, here = reason(error), Path(name).is_dir()
        # datasets does not hand on what the hub has answered to its first requests.
        problem = NOT_ASKED if "OfflineModeIsEnabled" in told else hub_problem(error, f"datasets/{name}")
        if problem and not here:
            raise FireflyError(f"{name}: no such file here, and {problem}") from error
        hint = "check name and network, set HF_ENDPOINT to a mirror, or log in with hf auth login where it is private"
        if here:
            hint = f"name its files, as in '{name}/*.jsonl'"
        raise FireflyError(f"{name}: neither a file nor a dataset that could be loaded ({told}); {hint}") from error


def _read(source: str, document_per: DocumentPer) -> Iterator[tuple[int, Any]]:
    if not is_file(source):
        return enumerate(load_hub_dataset(source), 1)
    form = format_of(source)
    if form == ".parquet":
        return _read_parquet(source)
    if form in (".csv", ".tsv"):
        return _read_table(source, "\t" if form == ".tsv" else ",")
    if form == ".txt":
        return _read_documents(source, document_per)
    if form == ".json" and _first_character(source) == "[":
        return read_json_array(source)
    return _parse_lines(source, read_lines(source))


def holds_json_lines(source: str) -> bool:
    """Whether a source is a file with a record on each line that is not blank."""
    form = format_of(source)
    others = form in (".parquet", ".csv", ".tsv", ".txt") or (form == ".json" and _first_character(source) == "[")
    return is_file(source) and not others


def read_json_lines(source: str, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (number, fields) of some lines of a file of JSON lines; blank ones are passed over.

    Args:
        source: The file.
        lines: The lines, each with its number.

    Raises:
        FireflyError: If a row is not an object; the message names file and line.
    """
    return _objects(source, _parse_lines(source, lines))


def _first_character(source: str) -> str:
    with open_text(source) as file:
        text = codecs.getincrementaldecoder(file.encoding)("replace").decode(file.bytes.read(4096))
        return text.lstrip()[:1]


def _read_documents(source: str, document_per: DocumentPer) -> Iterator[tuple[int, dict[str, str]]]:
    lines = ((number, line.removesuffix("\n").removesuffix("\r")) for number, line in read_lines(source))
    if document_per == "line":
        yield from ((number, {"text": line}) for number, line in lines if line.strip())
    elif (text := "\n".join(line for _, line in lines)).strip():
        yield 1, {"text": text.strip("\n")}


def _objects(source: str, records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, fields in records:
        if not isinstance(fields, dict):
            raise FireflyError(
                f"{source}:{number}: a row must be a JSON object, this is {type(fields).__name__}; mend the line"
            )
        yield number, fields


def _parse_lines(source: str, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, text in lines:
        if text.strip():
            yield number, _load_json(text, source, number)


def _load_json(text: str, source: str, number: int) -> Any:
    try:
        value = read_json(text)
    except json.JSONDecodeError as error:
        raise not_json(source, number, error.colno, error.msg) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits, or a key twice
        raise FireflyError(f"{source}:{number}: not a row, {error}; mend the line") from error
    return checked_depth(value, text.count("[") + text.count("{"), source, number)


def _read_table(source: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table whose first line names its columns; rows are numbered in their order, from 1.

    In ``.csv`` files quotes hold a cell together, also across line ends. In ``.tsv`` files quotes are ordinary text, as
    in most such files that are published.
    """
    csv.field_size_limit(1 << 30)  # the default refuses a cell of more than 131,072 characters
    reader = csv.reader(
        (line for _, line in read_lines(source)),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        columns = _columns(next(reader, []), source)
        for number, cells in enumerate(filter(None, reader), 1):
            if len(cells) != len(columns):
                raise FireflyError(
                    f"{source}:{reader.line_num}: {len(cells)} cells in a table of {len(columns)} columns; "
                    "mend the line"
                )
            yield number, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise FireflyError(f"{source}:{reader.line_num}: not a table, {error}; mend the line") from error


def _columns(names: list[str], source: str) -> list[str]:
    if len(set(names)) < len(names) or not all(names):
        raise FireflyError(f"{source}:1: the first line must name every column once, this is {', '.join(names)}")
    return names


def _read_parquet(source: str) -> Iterator[tuple[int, Any]]:
    if is_compressed(source):
        raise FireflyError(f"{source}: is a compressed Parquet file; unpack it, since Parquet is read from its end")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(source)
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise FireflyError(f"{source}: has the column {some(twice)} twice; rename one of them, or leave it out")
        for batch in file.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield number, fields
    except (
        pyarrow.ArrowException,
        ValueError,
    ) as error:  # a ValueError: text that is no UTF-8, or a time in nanoseconds
        raise FireflyError(f"{source}: not a readable Parquet file ({reason(error)})") from error
