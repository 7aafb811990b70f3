"""Scores of generated answers, for each kind those that suit its targets, synchronised over ranks by torchmetrics."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score

from firefly_lightning.evaluation.answer_parsing import corrections, entities, final_answer, label
from firefly_lightning.evaluation.predictions import Prediction
from firefly_lightning.model.metric_names import of_kind

Scores = dict[str, Tensor]
"""Scores by name."""


class AnswerScores:
    """Scores of answers by kind.

    Counts are kept on the host; :meth:`compute` moves them to the device on which ranks communicate.

    Args:
        kinds: Names of the kinds, the same on every rank, in the same order.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.metrics = {kind: metrics_of(kind) for kind in kinds}

    def update(self, predictions: Iterable[Prediction]) -> None:
        """Adds rows with their answers."""
        predictions = list(predictions)
        for kind, metrics in self.metrics.items():
            rows = [prediction for prediction in predictions if prediction["kind"] == kind]
            for metric in metrics:  # also without rows: torchmetrics warns of a metric that was never updated
                metric.update(rows)

    def compute(self, device: torch.device) -> Scores:
        """Scores such as ``bleu_of/Couplet``, of all ranks together, for the kinds that any rank had rows of."""
        found: Scores = {}
        for kind, metrics in self.metrics.items():
            for metric in metrics:
                found.update({of_kind(name, kind): score for name, score in metric.to(device).compute().items()})
        return found


def metrics_of(kind: str) -> list[Metric]:
    """The metrics that suit a kind; a kind that is not known is scored as free text."""
    if kind in ("NLI", "SentimentAnalyze", "TextMatching"):
        return [RowMean("exact_match", _same_label)]
    if kind == "NER":
        return [SetScore("entity", _entities)]
    if kind == "TextCorrection":
        return [SetScore("edit", _edits, beta=0.5)]
    text: list[Metric] = [CorpusScore("bleu", BLEU(tokenize="char")), CorpusScore("chrf", CHRF())]
    text.append(RowMean("rouge_l", _rouge_l))
    return [*text, RowMean("answer_accuracy", _same_answer)] if kind in ("Cot", "Program") else text


class CorpusScore(Metric):  # type: ignore[misc]
    """A score of sacrebleu, between 0 and 100, over all rows as one corpus.

    (torchmetrics' chrF leaves out the targets of rows without any n-gram in common: seen in 1.9.0.)

    Args:
        name: Name of the score.
        score: Metric of sacrebleu; what it counts in a row adds up over rows and ranks.
    """

    full_state_update = False
    counts: Tensor
    rows: Tensor

    def __init__(self, name: str, score: BLEU | CHRF) -> None:
        super().__init__()
        self.name, self.score = name, score
        size = len(self._count("", ""))
        self.add_state("counts", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Prediction]) -> None:
        """Adds the answers and targets of rows."""
        for row in rows:
            self.counts += torch.tensor(self._count(row["generated"], row["target"]))
        self.rows += len(rows)

    def compute(self) -> Scores:
        """The score by its name; nothing where there are no rows."""
        if not self.rows:
            return {}
        return {self.name: torch.tensor(self.score._compute_score_from_stats(self.counts.tolist()).score)}

    def _count(self, generated: str, target: str) -> list[int]:
        """The numbers of a row from which the corpus score is made; every metric of sacrebleu can give them."""
        counts: list[int] = self.score._extract_corpus_statistics([generated], [[target]])[0]
        return counts


class RowMean(Metric):  # type: ignore[misc]
    """The mean of the scores of rows, over the rows that have one.

    Args:
        name: Name of the score.
        score: Gives the score of a row, or None where the row has none.
    """

    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self, name: str, score: Callable[[Prediction], float | None]) -> None:
        super().__init__()
        self.name, self.score = name, score
        self.set_dtype(torch.float64)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Prediction]) -> None:
        """Adds the scores of rows."""
        scores = [score for score in map(self.score, rows) if score is not None]
        self.total += sum(scores)
        self.rows += len(scores)

    def compute(self) -> Scores:
        """The mean by its name; nothing where no row has a score."""
        return {self.name: self.total / self.rows} if self.rows else {}


class SetScore(Metric):  # type: ignore[misc]
    """Precision, recall and F of what answers name against what targets name, counted over all rows.

    F is ``(1 + β²) · P · R / (β² · P + R)``; below 1, β weighs precision more. Where answers name nothing, precision is
    1; where targets name nothing, recall is 1.

    Args:
        name: What answers name, such as ``entity``; the names of the scores begin with it.
        read: Gives the set that a row's target names, and the set that the row's answer names.
        beta: β in the formula of F.
    """

    full_state_update = False
    common: Tensor
    wanted: Tensor
    named: Tensor
    rows: Tensor

    def __init__(self, name: str, read: Callable[[Prediction], Sequence[set[Hashable]]], beta: float = 1.0) -> None:
        super().__init__()
        self.name, self.read, self.beta = name, read, beta
        for state in ("common", "wanted", "named", "rows"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Prediction]) -> None:
        """Adds what the targets and the answers of rows name."""
        for wanted, named in map(self.read, rows):
            self.common += len(wanted & named)
            self.wanted += len(wanted)
            self.named += len(named)
        self.rows += len(rows)

    def compute(self) -> Scores:
        """The three scores by name; nothing where there are no rows."""
        if not self.rows:
            return {}
        one, common = torch.ones((), dtype=torch.float64, device=self.common.device), self.common.double()
        precision = common / self.named if self.named else one
        recall = common / self.wanted if self.wanted else one
        weight = self.beta**2
        f = (1 + weight) * common / (weight * self.wanted + self.named) if self.wanted + self.named else one
        return {f"{self.name}_precision": precision, f"{self.name}_recall": recall, f"{self.name}_f{self.beta:g}": f}


def _same_label(row: Prediction) -> float:
    return float(label(row["generated"]) == label(row["target"]))


def _same_answer(row: Prediction) -> float | None:
    """Whether the final answers agree; None if the target marks none. An answer without the mark is taken whole."""
    wanted = final_answer(row["target"])
    return None if wanted is None else float((final_answer(row["generated"]) or label(row["generated"])) == wanted)


def _rouge_l(row: Prediction) -> float:
    """F of the longest common subsequence of characters, 0 to 100; space does not count, as in the other scores."""
    answer, target = ("".join(text.split()) for text in (row["generated"], row["target"]))
    scores = rouge_score(answer, target, rouge_keys="rougeL", normalizer=str, tokenizer=list)
    return 100 * float(scores["rougeL_fmeasure"])


def _entities(row: Prediction) -> Sequence[set[Hashable]]:
    return {*entities(row["target"])}, {*entities(row["generated"])}


def _edits(row: Prediction) -> Sequence[set[Hashable]]:
    wanted, named = corrections(row["input"], row["target"], row["generated"])
    return {*wanted}, {*named}
