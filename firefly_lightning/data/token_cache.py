"""Token ids of a source, made once, kept in an Arrow file and mapped into memory.

One folder of the cache holds one source under one tokenizer, format, length and policy; its name is a hash of all of
these and of the code that makes the folder.
"""

import functools
import gc
import inspect
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from tqdm import tqdm

from firefly_lightning import prompt as prompt_module
from firefly_lightning.data import row_arrays as row_arrays_module
from firefly_lightning.data import row_batches as row_batches_module
from firefly_lightning.data import windows as windows_module
from firefly_lightning.data.cache_folder import ensure_folder
from firefly_lightning.data.row_arrays import TooLong
from firefly_lightning.data.row_batches import SCHEMA, Cut, RowBatches
from firefly_lightning.data.sources import json_arrays as json_arrays_module
from firefly_lightning.data.sources import known_forms as known_forms_module
from firefly_lightning.data.sources import listed_turns as listed_turns_module
from firefly_lightning.data.sources import pair_forms as pair_forms_module
from firefly_lightning.data.sources import records as records_module
from firefly_lightning.data.sources import row_forms as rows_module
from firefly_lightning.data.sources import row_texts as row_texts_module
from firefly_lightning.data.sources import text_files as text_files_module
from firefly_lightning.data.sources.records import is_file, load_hub_dataset
from firefly_lightning.data.sources.row_forms import ReadRecord, Row, RowFormat, RowReader, RowRules
from firefly_lightning.data.sources.text_files import format_of
from firefly_lightning.data.tokenized_rows import REPORT_FILE, ROWS_FILE
from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.files.versions import Version, version_of
from firefly_lightning.prompt import PromptEncoder

# Tokenising in parallel and then forking loader workers is safe here, since workers never tokenise; unset, it warns.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

WHOLE = sys.maxsize
"""Value of ``max_length`` that cuts no row."""

ROWS_PER_BATCH = 4096

CHARACTERS_PER_BATCH = 1 << 24
"""Characters from which on a batch has fewer rows, since documents can be of any length."""


def default_cache_dir() -> Path:
    """The folder ``firefly_lightning`` in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "firefly_lightning"


def tokenize(
    source: str,
    encoder: PromptEncoder,
    max_length: int,
    too_long: TooLong,
    cache_dir: Path,
    rules: RowRules | None = None,
    stride: int = 1,
) -> Path:
    """The cache folder of a source, made if it is not there.

    Of several processes that need the same folder, one makes it, and the others wait.

    Args:
        source: A file, or the name of a Hugging Face dataset.
        encoder: Turns the texts of rows into token ids.
        max_length: Tokens beyond which a row is too long.
        too_long: What is done with an instruction row that is too long.
        cache_dir: The folder of all cache folders.
        rules: How rows are read.
        stride: Tokens that two windows of a document that is too long share.

    Raises:
        FireflyError: If the source is malformed, or the disk does not take the result.
    """
    rules, version = rules or RowRules(), version_of(Path(source)) if is_file(source) else None
    cut = Cut(max_length, too_long, stride)
    folder = cache_dir / _key(source, encoder, cut, rules)

    def fill(partial: Path) -> None:
        report = _write(partial / ROWS_FILE, source, encoder, cut, rules)
        (partial / REPORT_FILE).write_text(json.dumps(report, ensure_ascii=False), "utf-8")
        # What was read may not be what the folder is named for, not even if it has been changed back since.
        if version and not (is_file(source) and version_of(Path(source)) == version):
            raise FireflyError(f"{source}: was changed while it was read; start again when nothing writes to it")

    ensure_folder(folder, fill, f"the token ids of {source}")
    return folder


def _key(source: str, encoder: PromptEncoder, cut: Cut, rules: RowRules) -> str:
    functions = [one for one in (rules.row_format, rules.read) if one]
    how = list(rules._replace(row_format=None, read=None))
    settings = json.dumps([vars(encoder.prompt), *cut, how], sort_keys=True)
    parts = [settings, encoder.backend.to_str(), _hash_content(source), _hash_files(_CODE)]
    for function in functions:
        parts += [getattr(function, "__qualname__", ""), _hash_files([_file_of(function)])]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _file_of(row_format: RowFormat | ReadRecord) -> str:
    """The source file of a function that reads rows; when it changes, token ids are made anew."""
    file = inspect.getsourcefile(row_format) if inspect.isfunction(row_format) else None
    if file is None or not Path(file).is_file():
        raise FireflyError(
            "data.row_format: only a function of a file is taken, since token ids are made anew when the file changes; "
            "define it in one"
        )
    return file


_READERS = (
    prompt_module, rows_module, known_forms_module, listed_turns_module, row_texts_module, pair_forms_module,
    records_module, json_arrays_module, text_files_module, row_arrays_module, row_batches_module, windows_module,
)  # fmt: skip
_CODE = [__file__, *(str(module.__file__) for module in _READERS)]


def _hash_content(source: str) -> str:
    if is_file(source):
        # The suffix is part of the hash, since it decides whether a file is read as JSON lines or as Parquet.
        return format_of(source) + _hash_once(source)
    cached = [entry["filename"] for entry in load_hub_dataset(source).cache_files]
    return source + _hash_files(cached)


def _hash_once(path: str) -> str:
    """Hash of a file's content; ``prepare_data`` and ``setup`` both ask, and only a file that has changed is reread."""
    return _hash_of_version(path, version_of(Path(path)))


@functools.lru_cache
def _hash_of_version(path: str, version: Version) -> str:
    return _hash_files([path])


def _hash_files(paths: Sequence[str]) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise FireflyError(describe_os_error(error, path)) from error
    return digest.hexdigest()


def _write(path: Path, source: str, encoder: PromptEncoder, cut: Cut, rules: RowRules) -> dict[str, Any]:
    batches = RowBatches(encoder, cut, rules.together)
    reader = RowReader(source, rules)
    progress = tqdm(reader, desc=f"tokenising {Path(source).name}", unit=" rows", delay=2)
    with _no_garbage_collection(), pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for rows, texts in _encode_ahead(_chunks(progress, rules.together), encoder):
            for batch in batches.made_of(rows, texts):
                writer.write_batch(batch)
    left = {"unused": reader.unused, "faults": reader.faults}
    return {"source": source, "kinds": list(batches.counts), "counts": batches.counts, **left}


def _encode_ahead(chunks: Iterable[list[Row]], encoder: PromptEncoder) -> Iterator[tuple[list[Row], list[list[int]]]]:
    """Chunks of rows with the token ids of their texts; while one is worked on, the next two are being tokenised."""
    # Two threads, since the ids of one chunk become Python objects while the tokenizer works on the other.
    with ThreadPoolExecutor(2) as threads:
        under_way: deque[tuple[list[Row], Future[list[list[int]]]]] = deque()
        for chunk in chunks:
            texts = [text for row in chunk for turn in row.turns for text in turn]
            under_way.append((chunk, threads.submit(encoder.encode_texts, texts)))
            if len(under_way) == 3:
                rows, ids = under_way.popleft()
                yield rows, ids.result()
        for rows, ids in under_way:
            yield rows, ids.result()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns the garbage collector off, which saves a quarter of the time.

    Rows have no cycles, but their many lists would have the collector look through all objects that torch holds.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _chunks(rows: Iterable[Row], together: int) -> Iterator[list[Row]]:
    stream = iter(rows)  # made once, since a progress bar that is iterated anew for every chunk ends with the second
    while chunk := list(_at_most(stream, together)):
        yield chunk


def _at_most(rows: Iterator[Row], together: int) -> Iterator[Row]:
    """The rows of a batch; those of one record are not parted."""
    characters = 0
    for count, row in enumerate(itertools.islice(rows, ROWS_PER_BATCH // together * together), 1):
        yield row
        characters += sum(len(text) for turn in row.turns for text in turn)
        if characters > CHARACTERS_PER_BATCH and count % together == 0:
            return
