"""Looks at all rows in portions, and writes those that were chosen."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from firefly_lightning.data.sources.chunks import Chunk, read_chunks
from firefly_lightning.data.sources.records import DocumentPer
from firefly_lightning.files.resumable import code_digest
from firefly_lightning.preparation.cleaning import duplicates, lines, pieces, row_checks, signed_rows
from firefly_lightning.preparation.cleaning.signed_rows import ChunkSigner, SignedRows
from firefly_lightning.processes import map_in_order

ROWS_PER_CHUNK = 5000
"""Number of rows that a process works on at a time; a killed run goes on with the portions that were not whole."""

CODE = code_digest(*(str(module.__file__) for module in (duplicates, lines, pieces, row_checks, signed_rows)))
"""Digest of the code that says what is known of a row: portions of other code are not gone on with."""


class Looking(NamedTuple):
    """Looks at rows one by one, on all cores, and keeps what is known of them then.

    Attributes:
        folder: Where that is kept, in portions.
        document_per: What of a ``.txt`` file is a document.
        workers: Number of processes; one for each core where None.
        part: Which part of the portions is worked on, counted from 1, and of how many.
    """

    folder: Path
    document_per: DocumentPer
    workers: int | None
    part: tuple[int, int]

    def tell_of_earlier_run(self, out: str) -> None:
        """Says how much an earlier run has left."""
        if before := sum(1 for _ in self.folder.glob("*.arrow")):
            print(f"{out}: going on with {before} portions of at most {ROWS_PER_CHUNK:,} rows that were looked at")

    def at(self, sources: Sequence[str], name: str, lengths: range | None) -> list[Path]:
        """Looks at the rows of sources; returns the tables of all portions.

        Args:
            sources: Files and datasets.
            name: What the rows are.
            lengths: Numbers of characters that a text may have; None for validation rows.
        """
        tables: list[Path] = []
        chunks = self._chunks(sources, name.replace(" ", "_"), tables)
        with tqdm(desc=name, unit=" rows", delay=2) as progress:
            for count in map_in_order(ChunkSigner(lengths), chunks, self.workers, apart=True):
                progress.update(count)
        return tables

    def _chunks(self, sources: Sequence[str], name: str, tables: list[Path]) -> Iterator[tuple[Path, Chunk]]:
        part, parts = self.part
        for source in sources:
            for chunk in read_chunks(source, ROWS_PER_CHUNK, self.document_per):
                tables.append(self.folder / f"{name}-{len(tables):06}.arrow")
                if len(tables) % parts == part % parts:
                    yield tables[-1], chunk


def write_kept(rows: SignedRows, kept: NDArray[np.bool_], file: BinaryIO) -> None:
    """Writes the lines of the rows that were kept."""
    for at in range(rows.validation_tables, len(rows.tables)):
        of_portion = kept[rows.portion(at).start : rows.portion(at).stop]
        content, ends = rows.lines(at)
        # Neighbours that stay are written at once.
        turns = np.flatnonzero(np.diff(np.concatenate([[False], of_portion, [False]]))).reshape(-1, 2)
        for first, last in turns.tolist():
            file.write(memoryview(content)[ends[first] : ends[last]])
