"""Counts of rows and tokens by kind: how long rows are, and what a training cuts and pads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from firefly_lightning.data.division import division_of
from firefly_lightning.data.plan import StepPlan, WeightedRows
from firefly_lightning.data.sources.row_texts import beside_all
from firefly_lightning.data.tokenized_rows import NO_WINDOW, TokenizedRows
from firefly_lightning.preparation.stats import ALL

QUANTILES = (0.5, 0.9, 0.99)


def describe(
    whole: TokenizedRows, cut: TokenizedRows, padding: npt.NDArray[np.int64], max_length: int
) -> dict[str, dict[str, Any]]:
    """Counts and lengths of all rows, and then of every kind, the most frequent kind first.

    Args:
        whole: The rows at their full lengths.
        cut: The same rows as a training takes them, cut or left out where they are too long.
        padding: (rows,) padding tokens beside each row of ``cut``.
        max_length: Most tokens of a row in training.
    """
    order = np.argsort(-np.bincount(whole.kind_ids, minlength=len(whole.kinds)), kind="stable")
    named = [(ALL, None), *((beside_all(whole.kinds[at]), whole.kinds[at]) for at in order)]
    return {name: _describe(kind, whole, cut, padding, max_length) for name, kind in named}


def _describe(
    kind: str | None, whole: TokenizedRows, cut: TokenizedRows, padding: npt.NDArray[np.int64], max_length: int
) -> dict[str, Any]:
    lengths = whole.lengths[_of_kind(whole, kind)]
    kept = _of_kind(cut, kind)
    tokens, padded = int(cut.lengths[kept].sum()), int(padding[kept].sum())
    before, after = (
        int(rows.lengths[_of_kind(rows, kind) & (rows.windows == NO_WINDOW)].sum()) for rows in (whole, cut)
    )
    counts = [numbers for source in cut.counts for name, numbers in source.items() if kind in (None, name)]
    return {
        "rows": len(lengths),
        "share": len(lengths) / len(whole),
        "tokens": int(lengths.sum()),
        "target_tokens": int(whole.target_tokens[_of_kind(whole, kind)].sum()),
        **_lengths(lengths, max_length),
        **{name: sum(numbers[name] for numbers in counts) for name in ("windows", "truncated", "dropped", "no_target")},
        "truncated_tokens": before - after,  # of instruction rows: windows of documents hold all tokens
        "padding": padded / (padded + tokens) if tokens else None,  # where nothing is kept
    }


def _lengths(lengths: npt.NDArray[np.int32], max_length: int) -> dict[str, float | None]:
    """Mean, quantiles and maximum of lengths, and the share beyond a length; None where there is none to divide by."""
    measures: dict[str, Callable[[], float]] = {
        "mean": lambda: float(lengths.mean()),
        **{f"p{round(100 * at)}": lambda at=at: float(np.quantile(lengths, at)) for at in QUANTILES},  # type: ignore[misc]
        "longest": lambda: int(lengths.max()),
        "beyond": lambda: float(np.mean(lengths > max_length)),
    }
    return {name: measure() if len(lengths) else None for name, measure in measures.items()}


def padding_of(rows: TokenizedRows, batch_size: int, micro_batch_size: int | None, seed: int) -> npt.NDArray[np.int64]:
    """(rows,) padding tokens beside each row in the micro-batches of the first epoch on one device."""
    if not len(rows):
        return np.zeros(0, np.int64)
    plan = StepPlan(rows.lengths, rows.target_tokens, [WeightedRows(np.arange(len(rows)))], batch_size, seed)
    division, padding = division_of(plan, 1, micro_batch_size, None, 0), np.zeros(len(rows), np.int64)
    for step in tqdm(range(plan.steps_per_epoch), desc="padding", unit=" steps", delay=2):
        for micro_batch in division.shared(plan.rows(step), rows.lengths)[0]:
            lengths = rows.lengths[micro_batch]
            padding[micro_batch] = lengths.max(initial=0) - lengths
    return padding


def _of_kind(rows: TokenizedRows, kind: str | None) -> npt.NDArray[np.bool_]:
    """(rows,) which rows are of a kind; all for None."""
    if kind is None:
        return np.ones(len(rows), bool)
    found: npt.NDArray[np.bool_] = rows.kind_ids == (rows.kinds.index(kind) if kind in rows.kinds else -1)
    return found


def histogram(lengths: npt.NDArray[np.int32], width: int = 16) -> dict[str, Any]:
    """How many rows have from ``width`` · n tokens to fewer than ``width`` · (n + 1), by n."""
    counts = np.bincount(lengths // width)
    return {"tokens_a_bar": width, "rows": counts.tolist()}
