"""Chooses which rows stay: of rows that say the same, word for word or nearly, the first.

A portion of rows after the other is compared, on all cores, with the rows that were kept when its turn came; the few
kept since then are compared with when the portion is decided on. So each row meets all kept rows before it that may be
like it, as if they came one by one.
"""

import json
from array import array
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from firefly_lightning.data.sources.row_texts import names_of, printable
from firefly_lightning.preparation.cleaning.buckets import Buckets
from firefly_lightning.preparation.cleaning.compared_texts import ComparedTexts, Comparer, Comparison, Pair
from firefly_lightning.preparation.cleaning.findings import Findings
from firefly_lightning.preparation.cleaning.signed_rows import SignedRows
from firefly_lightning.processes import map_in_order


class Duplicate(NamedTuple):
    """An earlier row that a row repeats.

    Attributes:
        row: The earlier row.
        similarity: Jaccard similarity of the shingles of both rows; 1 where they are the same.
        exact: Whether the rows differ at most in blanks, punctuation, width and case.
    """

    row: int
    similarity: float
    exact: bool


class Chooser:
    """Chooses rows in their order, and says in the findings what became of each.

    Args:
        rows: All rows, those of the validation first.
        threshold: Jaccard similarity from which on two rows are near duplicates; 1 finds exact duplicates only.
        findings: Gets the counts and examples.
        workers: Number of processes that compare rows; one for each core by default.

    Attributes:
        kept: Whether each row stays, validation rows among them.
    """

    def __init__(self, rows: SignedRows, threshold: float, findings: Findings, workers: int | None = None) -> None:
        self.rows, self.threshold, self.findings, self.workers = rows, threshold, findings, workers
        self.kept = np.zeros(len(rows), np.bool_)
        self._buckets = Buckets(rows)
        # Numbers of arrays of this kind are Python's own, and so are faster to look at one by one.
        self._exact = [array("Q", rows.column(name).tobytes()) for name in ("exact_0", "exact_1")]
        self._sizes = array("I", rows.column("pieces").tobytes())
        self._texts, self._compare = ComparedTexts(rows), Comparer(rows.tables, threshold)
        self._questions: dict[int, int] = {}
        self._last = -1

    def choose(self) -> None:
        """Decides on all rows."""
        for row, question in enumerate(self.rows.column("question")[: self.rows.validation].tolist()):
            self._keep(row)
            if question:
                self._questions.setdefault(question, row)
        with tqdm(desc="comparing", unit=" rows", delay=2, total=len(self.rows) - self.rows.validation) as progress:
            for at, known in map_in_order(self._compare, self._portions(), self.workers):
                self._decide(at, known)
                progress.update(len(self.rows.portion(at)))

    def _portions(self) -> Iterator[Comparison]:
        for at in range(self.rows.validation_tables, len(self.rows.tables)):
            sharing = (row for row in self.rows.portion(at) if self._buckets.shares[row])
            yield self._texts.comparison(at, [(row, other) for row in sharing for other in self._like(row)[1]])

    def _like(self, row: int) -> tuple[int | None, list[int]]:
        """The first kept row that is the same as a row; if there is none, the kept rows that may be like it."""
        others = self._buckets.kept_beside(row)
        first, second = self._exact
        for other in others:
            if first[other] == first[row] and second[other] == second[row]:
                return other, []
        if self.threshold == 1:  # other texts may have the same pieces in another order
            return None, []
        # What both have is at most what the smaller one has, and what either has at least what the larger one has.
        size = self._sizes[row]
        least, most = self.threshold * size, size / self.threshold
        return None, [other for other in others if least <= self._sizes[other] <= most]

    def _decide(self, at: int, known: dict[Pair, float]) -> None:
        columns = self.rows.columns(at, ["kind", "fault", "shown", "raw", "question"])
        findings = self.findings
        for row, kind, fault, shown, raw, question in zip(self.rows.portion(at), *columns.values(), strict=True):
            findings.count(kind, "read")
            if fault:
                findings.leave_out(kind, fault, partial(self._example, row, shown))
            elif (asked := self._questions.get(question)) is not None:
                self._leave_out(row, kind, Duplicate(asked, 1, True))
            elif self._buckets.shares[row] and (duplicate := self._find(row, known)):
                self._leave_out(row, kind, duplicate)
            else:
                findings.keep(kind, partial(self._names, row) if raw else None)
                self._keep(row)
                self._last = row

    def _find(self, row: int, known: dict[Pair, float]) -> Duplicate | None:
        """What of the validation rows a row repeats most, or else of the rows before it; of equals the first."""
        same, others = self._like(row)
        if same is not None:
            return Duplicate(same, 1, True)
        late = [(row, other) for other in others if (row, other) not in known]
        if late:
            known = known | self._compare(self._texts.comparison(0, late))[1]
        alike = [Duplicate(other, similarity, False) for other in others if (similarity := known[row, other])]
        forbidden = [one for one in alike if one.row < self.rows.validation]
        return max(forbidden or alike, key=lambda one: one.similarity, default=None)

    def _keep(self, row: int) -> None:
        self.kept[row] = True
        if self._buckets.shares[row]:
            self._buckets.keep(row)

    def _leave_out(self, row: int, kind: str, duplicate: Duplicate) -> None:
        reason = "duplicate" if duplicate.exact else "near duplicate"
        if duplicate.row < self.rows.validation:
            reason = "in the validation rows"
        elif duplicate.row == self._last and self.rows.source(row) == self.rows.source(duplicate.row):
            self.findings.neighbours[kind] += not duplicate.exact
        self.findings.leave_out(kind, reason, partial(self._example, row, None, duplicate.row))

    def _example(self, row: int, shown: str | None, like: int | None = None) -> dict[str, str]:
        found = {"where": self.rows.where(row), "text": self.rows.shown(row) if shown is None else shown}
        return found if like is None else {**found, "like": self.rows.where(like)}

    def _names(self, row: int) -> str:
        return printable(names_of(json.loads(self.rows.line(row))))
