"""Token ids of a source, made once, kept in an Arrow file and mapped into memory.

One folder of the cache holds one source under one tokenizer, format, length and policy; its name is a hash of all of
them and of the code that makes it. It appears by a rename when it is complete, so what is there can be used.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from filelock import FileLock
from tqdm import tqdm

from firefly_lightning.data import json_arrays as json_arrays_module
from firefly_lightning.data import prompt as prompt_module
from firefly_lightning.data import records as records_module
from firefly_lightning.data import rows as rows_module
from firefly_lightning.data.prompt import EncodedRow, PromptEncoder
from firefly_lightning.data.records import is_file, load_hub_dataset
from firefly_lightning.data.rows import Row, read_rows
from firefly_lightning.errors import FireflyError, describe_os_error

# Tokenising in parallel and then forking loader workers is safe here, since workers never tokenise; unset, it warns.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

TooLong = Literal["truncate", "truncate_keep_end", "drop"]
"""What is done with a row of more than ``max_length`` tokens: its first tokens are kept, or its start and its last
tokens, or it is left out."""

WHOLE = sys.maxsize
"""A length that cuts no row."""

ROWS_PER_BATCH = 4096
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "target_mask": pa.list_(pa.bool_()),
        "target_tokens": pa.int32(),
        "kind": pa.int32(),
        "number": pa.int64(),
        "identity": pa.uint64(),
    }
)
Counts = dict[str, dict[str, int]]
"""By kind, what ``COUNTED`` names: rows read, cut, left out or short of a last answer, and tokens kept."""

COUNTED = ("rows", "truncated", "dropped", "no_target", "unanswered", "tokens", "target_tokens")


class TokenizedRow(NamedTuple):
    """One row: (length,) token ids, and (length,) whether each is learned."""

    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class TokenizedRows:
    """Rows of several cache folders, one after another.

    Args:
        folders: From :func:`tokenize`.
        names: What each is called in messages.
    """

    def __init__(self, folders: Sequence[Path], names: Sequence[str]) -> None:
        self.folders, self.names = list(folders), list(names)
        self.counts: list[Counts] = []
        self.kinds: list[str] = []
        self._batches: list[pa.RecordBatch] = []
        kinds: list[npt.NDArray[np.int32]] = []
        sizes: list[int] = []
        for folder in self.folders:
            report = json.loads((folder / "report.json").read_text("utf-8"))
            self.counts.append(report["counts"])
            renumbered = np.array([self._kind_id(kind) for kind in report["kinds"]], np.int32)
            batches = _map_batches(folder / "rows.arrow")
            kinds += [renumbered[_column(batch, "kind")] for batch in batches]
            sizes.append(sum(batch.num_rows for batch in batches))
            self._batches += batches
        self.ends = np.cumsum(sizes)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths = _concatenate([np.diff(batch.column("input_ids").offsets) for batch in self._batches])
        self.target_tokens = _concatenate([_column(batch, "target_tokens") for batch in self._batches])
        self.kind_ids = _concatenate(kinds)
        self.identities: npt.NDArray[np.uint64] = np.concatenate(
            [np.zeros(0, np.uint64), *(batch.column("identity").to_numpy() for batch in self._batches)]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> TokenizedRow:
        batch, index = self._locate(row)
        ids, mask = batch.column("input_ids"), batch.column("target_mask")
        first, last = ids.offsets[index].as_py(), ids.offsets[index + 1].as_py()
        return TokenizedRow(ids.values[first:last].to_numpy(), mask.values[first:last].to_numpy(zero_copy_only=False))

    def of_source(self, index: int) -> npt.NDArray[np.int64]:
        """Rows of one source."""
        return np.arange(self.ends[index - 1] if index else 0, self.ends[index])

    def describe(self, row: int) -> str:
        """Where a row came from: source, line and kind."""
        batch, index = self._locate(row)
        source = self.names[int(np.searchsorted(self.ends, row, side="right"))]
        return f"{source}:{batch.column('number')[index].as_py()} ({self.kinds[self.kind_ids[row]]})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is started afresh maps the files itself instead of being sent their content.
        return type(self), (self.folders, self.names)

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch], int(row - self._starts[batch])

    def _kind_id(self, kind: str) -> int:
        if kind not in self.kinds:
            self.kinds.append(kind)
        return self.kinds.index(kind)


def default_cache_dir() -> Path:
    """``firefly_lightning`` in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "firefly_lightning"


def tokenize(source: str, encoder: PromptEncoder, max_length: int, too_long: TooLong, cache_dir: Path) -> Path:
    """The cache folder of a source, made if it is not there.

    Two processes that need the same folder wait for each other; one of them makes it.

    Raises:
        FireflyError: If the source is malformed, or the disk does not take the result.
    """
    folder = cache_dir / _key(source, encoder, max_length, too_long)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{folder.name}.lock"):
            if not folder.is_dir():
                _make(folder, source, encoder, max_length, too_long)
    except OSError as error:
        raise FireflyError(describe_os_error(error, cache_dir)) from error
    return folder


def _key(source: str, encoder: PromptEncoder, max_length: int, too_long: TooLong) -> str:
    settings = json.dumps([vars(encoder.prompt), max_length, too_long], sort_keys=True)
    parts = [settings, encoder.backend.to_str(), _hash_content(source), _hash_files(_CODE)]
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


_READERS = (prompt_module, rows_module, records_module, json_arrays_module)
_CODE = [__file__, *(str(module.__file__) for module in _READERS)]


def _hash_content(source: str) -> str:
    if is_file(source):
        # Whether it is read as JSON lines or as Parquet depends on the suffix too.
        return Path(source).suffix + _hash_files([source])
    cached = [entry["filename"] for entry in load_hub_dataset(source).cache_files]
    return source + _hash_files(cached)


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


def _make(folder: Path, source: str, encoder: PromptEncoder, max_length: int, too_long: TooLong) -> None:
    """Fills a temporary folder beside the final one and renames it."""
    for left_over in folder.parent.glob(f"{folder.name}.tmp*"):
        shutil.rmtree(left_over)  # of a process that was killed; a living one would hold the lock
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
    try:
        report = _write(temporary / "rows.arrow", source, encoder, max_length, too_long)
        (temporary / "report.json").write_text(json.dumps(report, ensure_ascii=False), "utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, source: str, encoder: PromptEncoder, max_length: int, too_long: TooLong) -> dict[str, Any]:
    counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTED, 0))
    start = len(encoder.encode([()])[0].input_ids)
    progress = tqdm(read_rows(source), desc=f"tokenising {Path(source).name}", unit=" rows", delay=2)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for rows in _chunks(progress, ROWS_PER_BATCH):
            encoded = encoder.encode([row.turns for row in rows])
            kept = []
            for row, whole in zip(rows, encoded, strict=True):
                cut = _count_and_cut(row, whole, counts[row.kind], max_length, too_long, start)
                if cut is not None:
                    kept.append((row, cut))
            kinds = {kind: index for index, kind in enumerate(counts)}
            writer.write_batch(_record_batch(kept, kinds))
    return {"source": source, "kinds": list(counts), "counts": counts}


def _count_and_cut(
    row: Row, encoded: EncodedRow, counts: dict[str, int], max_length: int, too_long: TooLong, start: int
) -> EncodedRow | None:
    """The row as it will be learned, or None if nothing of it can be."""
    counts["rows"] += 1
    counts["unanswered"] += row.unanswered
    if len(encoded.input_ids) > max_length:
        if too_long == "drop":
            counts["dropped"] += 1
            return None
        counts["truncated"] += 1
        encoded = cut_row(encoded, max_length, too_long, start)
    if not any(encoded.target_mask):
        counts["no_target"] += 1
        return None
    counts["tokens"] += len(encoded.input_ids)
    counts["target_tokens"] += sum(encoded.target_mask)
    return encoded


def cut_row(row: EncodedRow, max_length: int, too_long: TooLong, start: int) -> EncodedRow:
    """The first ``max_length`` tokens, or (``truncate_keep_end``) the ``start`` first and the last ones.

    Args:
        row: More than ``max_length`` tokens.
        max_length: Tokens to keep.
        too_long: The policy.
        start: Tokens of the format's start, which every row keeps.
    """
    if too_long == "truncate":
        return EncodedRow(row.input_ids[:max_length], row.target_mask[:max_length])
    end = len(row.input_ids) - (max_length - start)
    return EncodedRow(row.input_ids[:start] + row.input_ids[end:], row.target_mask[:start] + row.target_mask[end:])


def _record_batch(kept: Sequence[tuple[Row, EncodedRow]], kinds: dict[str, int]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(cut.input_ids) for _, cut in kept)], dtype=np.int32)
    ids = np.fromiter(itertools.chain.from_iterable(cut.input_ids for _, cut in kept), np.int32, offsets[-1])
    mask = np.fromiter(itertools.chain.from_iterable(cut.target_mask for _, cut in kept), np.bool_, offsets[-1])
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(ids)),
        pa.ListArray.from_arrays(offsets, pa.array(mask)),
        pa.array([sum(cut.target_mask) for _, cut in kept], pa.int32()),
        pa.array([kinds[row.kind] for row, _ in kept], pa.int32()),
        pa.array([row.number for row, _ in kept], pa.int64()),
        pa.array([row.identity for row, _ in kept], pa.uint64()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    stream = iter(rows)  # once: a progress bar that is iterated anew for every chunk ends with the second
    while chunk := list(itertools.islice(stream, size)):
        yield chunk


def _map_batches(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _column(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.int32]:
    column: npt.NDArray[np.int32] = batch.column(name).to_numpy()
    return column


def _concatenate(parts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *parts])
