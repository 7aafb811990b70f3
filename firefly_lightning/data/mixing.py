"""How many rows of each source and kind an epoch takes, and which rows two sources share."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from firefly_lightning.data.plan import Rows, WeightedRows, apportion, permutation
from firefly_lightning.data.tokenized_rows import TokenizedRows
from firefly_lightning.errors import FireflyError, check_number

MOST = 1_000_000
"""Largest weight of a source or a kind, and the most epochs that it can be held to."""


class Share(TypedDict, total=False):
    """How much of a source, or of a kind, is taken.

    Attributes:
        weight: How often an epoch takes each row: 1 once, 0.5 half of the rows (later epochs the others), 2 twice.
        cap: Rows that an epoch takes at most.
        epochs: How often each row is taken at most in the whole run; other sources or kinds then fill its place.
    """

    weight: float
    cap: int
    epochs: float


class _Path(TypedDict):
    path: str


class Source(_Path, Share, total=False):
    """Rows to train on.

    Attributes:
        path: A file, a glob of files (the share then holds for each file alone), or the name of a Hugging Face dataset.
        weight: How often an epoch takes each row: 1 once, 0.5 half of the rows (later epochs the others), 2 twice.
        cap: Rows that an epoch takes at most.
        epochs: How often each row is taken at most in the whole run; other sources then fill its place.
    """

    # No dataclass, since jsonargparse would then take the file of rows for a configuration and read it.


def as_source(source: str | Source) -> Source:
    """A source as a user may write it, plain or with its share."""
    return {"path": source} if isinstance(source, str) else source


def listed(files: Any) -> list[Any]:
    """What a user may write as one or as a list of them, or leave out, as a list."""
    return [files] if isinstance(files, str) else list(files or [])


def check_share(share: Mapping[str, Any], key: str, name: str) -> None:
    """Checks the share that a user wrote for a source or a kind.

    Args:
        share: The share; see :class:`Share`.
        key: Key of the configuration that holds it.
        name: Name of the source or the kind.

    Raises:
        FireflyError: If a number of the share is not above 0, or so large that an epoch would have no end.
    """
    for part, most in {"weight": MOST, "cap": None, "epochs": MOST}.items():
        check_number(f"{key}: the {part} of {name}", share.get(part), above=0, most=most)


def check_shares(sources: Sequence[Source], kinds: Mapping[str, Share]) -> None:
    """Checks the shares that a user wrote for sources and for kinds; raises as :func:`check_share`."""
    for source in sources:
        check_share(source, "data.train_files", source["path"])
    for kind, share in kinds.items():
        check_share(share, "data.kinds", kind)


def mix(
    rows: TokenizedRows, available: npt.NDArray[np.bool_], sources: Sequence[Share], kinds: Mapping[str, Share]
) -> list[WeightedRows]:
    """The parts of a plan: the available rows of each source, with a part of its own for each kind that has a share.

    A row's weight is its source's weight times its kind's. A cap cuts all parts that it holds for by the same factor.

    Args:
        rows: The rows of all sources.
        available: (rows,) which of the rows may be taken.
        sources: The share of each source.
        kinds: The shares of kinds by name, over all sources.

    Raises:
        FireflyError: If no row is of a kind that ``kinds`` names.
    """
    if unknown := [kind for kind in kinds if kind not in rows.kinds]:
        raise FireflyError(
            f"data.kinds: no row is of the kind {', '.join(unknown)}; there are {', '.join(sorted(rows.kinds))}"
        )
    named = np.array([kind in kinds for kind in rows.kinds], bool)
    parts = []
    for at, source in enumerate(sources):
        taken = rows.of_source(at)
        taken = taken[available[taken]]
        ids = rows.kind_ids[taken]
        parts.append(_Part(taken[~named[ids]], source, {}, at, None))
        parts += [_Part(taken[ids == rows.kinds.index(kind)], source, kinds[kind], at, kind) for kind in kinds]
    parts = [part for part in parts if len(part.rows)]
    for at, source in enumerate(sources):
        _cap(parts, lambda part, at=at: part.source == at, source.get("cap"))  # type: ignore[misc]
    for kind, share in kinds.items():
        _cap(parts, lambda part, kind=kind: part.kind == kind, share.get("cap"))  # type: ignore[misc]
    return [WeightedRows(part.rows, part.weight, part.epochs) for part in parts]


class _Part:
    """Rows of one source that are of one kind, or of all the kinds without a share of their own."""

    def __init__(self, rows: Rows, source: Share, kind: Share, at: int, name: str | None) -> None:
        self.rows, self.source, self.kind = rows, at, name
        self.weight = source.get("weight", 1.0) * kind.get("weight", 1.0)
        self.epochs = min(source.get("epochs", inf), kind.get("epochs", inf))

    @property
    def quota(self) -> int:
        """Number of rows of this part that an epoch takes."""
        return round(self.weight * len(self.rows))


def split(
    rows: TokenizedRows, sources: Sequence[Share], kinds: Mapping[str, Share], val_fraction: float, seed: int
) -> tuple[list[WeightedRows], list[WeightedRows]]:
    """The rows to train on, by source and kind with their shares, and the rows held out for validation.

    Rows that two sources share are reported, and taken from the first source alone.

    Args:
        rows: The rows of all sources.
        sources: The share of each source.
        kinds: The share of each kind that has one.
        val_fraction: Fraction of the rows that is held out.
        seed: Seed that decides which rows are held out.

    Raises:
        FireflyError: If nothing is left to train or to validate on.
    """
    repeated = repeated_rows(rows)
    for line in describe_repeated(rows, repeated):
        rank_zero_info(line)
    held_out = np.zeros(len(rows), bool)
    if val_fraction:
        order = permutation(len(rows), seed)
        order = order[~repeated[order]]
        held_out[order[: round(val_fraction * len(order))]] = True
        held_out = held_out[_first_windows(rows)]  # nothing of a document that is validated on is trained on
    taken = mix(rows, ~held_out & ~repeated, sources, kinds)
    if not taken or (val_fraction and not held_out.any()):
        documents = np.count_nonzero(rows.windows <= 0)  # all windows of a document are on one side
        of = f"{len(rows)} rows" if documents == len(rows) else f"{len(rows)} rows, windows of {documents} documents,"
        raise FireflyError(f"data.val_fraction {val_fraction} of {of} leaves one side empty; choose another")
    return taken, [WeightedRows(np.flatnonzero(held_out))]


def _first_windows(rows: TokenizedRows) -> Rows:
    """(rows,) for each row the first window of its document; an instruction row itself."""
    return np.arange(len(rows)) - np.maximum(rows.windows, 0)


def _cap(parts: Sequence[_Part], belongs: Callable[[_Part], bool], cap: int | None) -> None:
    under = [part for part in parts if belongs(part)]
    quotas = [part.quota for part in under]
    if cap is not None and sum(quotas) > cap:
        for part, quota in zip(under, apportion(cap, quotas), strict=True):
            part.weight = quota / len(part.rows)


def repeated_rows(rows: TokenizedRows) -> npt.NDArray[np.bool_]:
    """(rows,) which rows an earlier source has too; texts that differ in form or in blanks only are the same."""
    repeated = np.zeros(len(rows), bool)
    for at in range(1, len(rows.names)):
        of_source = rows.of_source(at)
        earlier = rows.identities[: of_source[0]] if len(of_source) else rows.identities[:0]
        repeated[of_source] = np.isin(rows.identities[of_source], earlier)
    return repeated


def describe_repeated(rows: TokenizedRows, repeated: npt.NDArray[np.bool_]) -> list[str]:
    """A line for each source that has rows of earlier sources, to tell the user."""
    lines = []
    for at, name in enumerate(rows.names):
        of_source = rows.of_source(at)
        left_out = of_source[repeated[of_source]]
        if len(left_out):
            counts = np.bincount(rows.kind_ids[left_out], minlength=len(rows.kinds))
            kinds = ", ".join(f"{count:,} {rows.kinds[kind]}" for kind, count in enumerate(counts) if count)
            lines.append(
                f"{name}: {len(left_out):,} of {len(of_source):,} rows ({kinds}) are in the files before it too, "
                "and are taken from there only"
            )
    return lines
