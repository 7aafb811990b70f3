"""Log-probabilities of pairs under the reference: the model before its first step, or an adapter's base.

They are computed once, so that training holds one model, and kept in the cache folder and in every checkpoint.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor, nn
from tqdm import tqdm

from firefly_lightning.data.cache_folder import ensure_folder, is_whole
from firefly_lightning.data.plan import Rows
from firefly_lightning.data.tokenized_rows import REPORT_FILE, ROWS_FILE
from firefly_lightning.preference.pairs import PairBatch, PlannedPairs, TokenizedPairs, each_once

COLUMNS = ("chosen", "rejected")
"""Columns of the file of a cache folder: sums of log-probabilities of the answers, in nats, in float32."""


class ReferenceLogProbs:
    """The log-probabilities of the answers of pairs under the reference, by the pairs that they are of.

    Attributes:
        known: (pairs, 2) sums in float32 on the host, by the digest of the pairs.
    """

    def __init__(self) -> None:
        self.known: dict[str, Tensor] = {}
        self._placed: dict[str, Tensor] = {}

    def take(self, saved: Mapping[str, Tensor]) -> None:
        """Takes those of a checkpoint."""
        self.known = {digest: values.cpu() for digest, values in saved.items()}
        self._placed.clear()

    def fits(self, pairs: TokenizedPairs) -> bool:
        """Whether those of these pairs are known."""
        return pairs.digest() in self.known

    def put(self, pairs: TokenizedPairs, values: Tensor) -> None:
        """Keeps those of these pairs, (pairs, 2)."""
        self.known[pairs.digest()] = values

    def of(self, pairs: TokenizedPairs, numbers: Tensor) -> Tensor:
        """Those of some of the pairs, (those, 2), on the device of their ``numbers``, (those,)."""
        digest = _digest_once(pairs)
        if digest not in self._placed or self._placed[digest].device != numbers.device:
            self._placed[digest] = self.known[digest].to(numbers.device)
        return self._placed[digest].index_select(0, numbers)


class ReferenceCache:
    """Files of log-probabilities in the cache folder, one for each source of pairs under one model.

    Args:
        folder: The folder of all cache folders.
        model: What identifies the model and how it computes; None keeps nothing.
        share: Gives every process what the first one calls it with.
        first: Whether this is the first process, which reads and writes.
    """

    def __init__(self, folder: Path, model: str | None, share: Callable[[Any], Any], first: bool) -> None:
        self._folder, self._model, self._share, self._first = folder, model, share, first

    def read(self, source: Path) -> Tensor | None:
        """Those of a cache folder of pairs, (its pairs, 2), on all processes; None where they are not kept."""
        found = _read(self._place(source)) if self._model and self._first else None
        shared: Tensor | None = self._share(found)
        return shared

    def write(self, source: Path, name: str, values: Tensor) -> None:
        """Keeps those of a cache folder of pairs; all processes call it.

        Args:
            source: The cache folder of the pairs.
            name: Name of their source in messages.
            values: (its pairs, 2) the log-probabilities.

        Raises:
            FireflyError: If the disk does not take them.
        """
        if not (self._model and self._first):
            return

        def fill(partial: Path) -> None:
            table = pa.table({column: values[:, at].numpy() for at, column in enumerate(COLUMNS)})
            with pa.OSFile(str(partial / ROWS_FILE), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            told = {"reference_log_probs": name, "pairs": source.name, "model": self._model}
            (partial / REPORT_FILE).write_text(json.dumps(told, ensure_ascii=False), "utf-8")

        ensure_folder(self._place(source), fill, f"the reference log-probabilities of {name}")

    def _place(self, source: Path) -> Path:
        return self._folder / xxhash.xxh3_128_hexdigest(f"{self._model}\0{source.name}".encode())


def ensure_reference(
    reference: ReferenceLogProbs, batches: PlannedPairs, cache: ReferenceCache, compute: "Compute | None"
) -> bool:
    """Finds the log-probabilities of all pairs: those that the cache has, and computes the others.

    All processes call this together.

    Args:
        reference: Where they are kept.
        batches: Micro-batches of the pairs.
        cache: Where they are looked for, and kept when computed.
        compute: Computes those of pairs by their numbers; None where the model is the reference no longer.

    Returns:
        Whether they are known now.
    """
    pairs = batches.rows
    values = torch.empty(len(pairs), len(COLUMNS))
    for at, (source, name) in enumerate(zip(pairs.folders, pairs.names, strict=True)):
        numbers = pairs.of_source(at)
        found = cache.read(source)
        if found is None or len(found) != len(numbers):
            if compute is None:
                return False
            found = compute(batches, numbers, name)
            cache.write(source, name, found)
        values[torch.from_numpy(numbers)] = found
    reference.put(pairs, values)
    return True


Compute = Callable[[PlannedPairs, Rows, str], Tensor]
"""Computes the log-probabilities of pairs, (those, 2), from micro-batches, numbers and the name of their source."""


def computed_by(trainer: Any, evaluate: Callable[[PairBatch], Tensor]) -> Compute:
    """Computes the log-probabilities by the model as it is, in evaluation mode, each rank a share of the pairs.

    Args:
        trainer: The trainer, whose strategy is set up.
        evaluate: Gives (pairs, 2) of a micro-batch, as a step of the strategy; all ranks make as many calls.
    """

    def compute(batches: PlannedPairs, numbers: Rows, name: str) -> Tensor:
        each = each_once(batches, numbers)
        strategy = trainer.strategy
        sums = torch.zeros(len(batches.rows), len(COLUMNS) + 1, device=strategy.root_device)
        shows = {"desc": f"reference log-probabilities of {Path(name).name}", "unit": " steps", "delay": 2}
        with _evaluating(trainer.model), torch.no_grad():
            for index in tqdm(range(len(each)), disable=not trainer.is_global_zero, **shows):
                batch = strategy.batch_to_device(each[index])
                found = evaluate(batch)
                sums.index_add_(0, batch["rows"], torch.cat([found, torch.ones_like(found[:, :1])], 1).to(sums.dtype))
        # Ranks that split a model have all worked on the same pairs, which are then there more than once.
        values = strategy.reduce(sums, reduce_op="sum")[torch.from_numpy(numbers).to(sums.device)]
        means: Tensor = (values[:, :-1] / values[:, -1:]).cpu()
        return means

    return compute


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model, and what a strategy has around it, into evaluation mode, and each part back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _read(folder: Path) -> Tensor | None:
    if not is_whole(folder, says=True):
        return None
    with pa.memory_map(str(folder / ROWS_FILE)) as file:
        table = pa.ipc.open_file(file).read_all()
        columns = [np.array(table.column(name).combine_chunks().to_pylist(), np.float32) for name in COLUMNS]
    return torch.from_numpy(np.stack(columns, 1))


def _digest_once(pairs: TokenizedPairs) -> str:
    known: str | None = vars(pairs).get("_digest")
    if known is None:
        known = vars(pairs)["_digest"] = pairs.digest()
    return known
