"""Preference tuning as it must be: pairs of real text, and stock Bloom that learns them in plain PyTorch."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BloomForCausalLM

from firefly_lightning import PreferenceDataModule
from firefly_lightning.huggingface import load_tokenizer
from tests.conftest import write_rows
from tests.support.reference import Trained
from tests.support.strategies import CLIP, LEARNING_RATE, WARMUP, planned

BETA = 0.3

Labelled = tuple[list[int], list[int]]
"""Token ids of a row and its labels, -100 where nothing is learned."""

PREFERENCE = ["--model", "firefly_lightning.PreferenceModule", "--data", "firefly_lightning.PreferenceDataModule",
              "--model.beta", BETA]  # fmt: skip


def made_pairs(reviews: Sequence[str], count: int, first: int = 0) -> list[dict]:
    """Pairs of mixed kinds and lengths: some with turns before, some of whose answers begin alike."""
    pairs = []
    for at in range(first, first + count):
        review, better, worse = (reviews[(3 * at + step) % len(reviews)] for step in range(3))
        pair = {
            "kind": ["SentimentAnalyze", "Summary"][at % 2],
            "input": f"评论：{review[: 20 + 7 * (at % 9)]}",
            "chosen": f"好{better[: 4 + 3 * (at % 11)]}",
            "rejected": f"坏{worse[: 3 + 4 * (at % 7)]}",
        }
        if at % 5 == 0:
            pair["history"] = [[f"第{at}条", worse[:9]]]
        if at % 4 == 0:
            pair["rejected"] = pair["chosen"][:3] + "不" + worse[: at % 6]
        pairs.append(pair)
    return pairs


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory, reviews) -> Path:
    """36 pairs: with eight a step, four whole steps and one of four."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", made_pairs(reviews, 36))


@pytest.fixture(scope="session")
def val_pairs_file(tmp_path_factory, reviews) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "val.jsonl", made_pairs(reviews, 7, first=50))


def labelled_pairs(folder: Path, pairs_file: Path) -> list[tuple[Labelled, Labelled]]:
    """Chosen and rejected row of every pair of a file, put together here and not by the code under test."""
    tokenizer = load_tokenizer(str(folder))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def row(pair: dict, answer: str) -> Labelled:
        ids = [1]
        for index, (asked, said) in enumerate([*pair.get("history", []), (pair["input"], answer)]):
            ids += encode(asked) + [2] * (1 if index else 2)
            begin = len(ids)
            ids += [*encode(said), 2]
        return ids, [-100] * begin + ids[begin:]

    pairs = map(json.loads, pairs_file.read_text("utf-8").splitlines())
    return [(row(pair, pair["chosen"]), row(pair, pair["rejected"])) for pair in pairs]


def row_log_prob(model: BloomForCausalLM, row: Labelled) -> tuple[Tensor, int]:
    """Sum of the log-probabilities of the labels of a row, and their number."""
    ids, labels = row
    scores = F.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
    places = [at for at, label in enumerate(labels[1:]) if label != -100]
    return sum(scores[at, labels[at + 1]] for at in places), len(places)


def plain_loss(apart: Tensor, loss: str, beta: float, smoothing: float) -> Tensor:
    """The losses as they are printed in the papers."""
    if loss == "ipo":
        return (apart - 1 / (2 * beta)) ** 2
    right = torch.sigmoid(beta * apart)
    return -(1 - smoothing) * torch.log(right) - smoothing * torch.log(1 - right)


Pairs = Sequence[tuple[Labelled, Labelled]]


@torch.no_grad()
def reference_of(model: BloomForCausalLM, pairs: Pairs) -> list[tuple[float, float]]:
    return [tuple(float(row_log_prob(model, row)[0]) for row in pair) for pair in pairs]


def pair_backward(model, pairs: Pairs, reference, loss="sigmoid", beta=BETA, smoothing=0.0) -> float:
    """Computes loss and gradients of a step, pair by pair; the gradients are left in the model."""
    total = 0.0
    for pair, known in zip(pairs, reference, strict=True):
        ratios = []
        for row, of_reference in zip(pair, known, strict=True):
            found, count = row_log_prob(model, row)
            ratios.append((found - of_reference) / (count if loss == "ipo" else 1))
        value = plain_loss(ratios[0] - ratios[1], loss, beta, smoothing) / len(pairs)
        value.backward()
        total += float(value.detach())
    return total


class TrainedOnPairs(Trained):
    """A stock Bloom that is trained on the given pairs in each step, by DPO."""

    def learned(self, first: BloomForCausalLM, folder: Path, rows_file: Path) -> Callable:
        pairs = labelled_pairs(folder, rows_file)
        reference = reference_of(first, pairs)

        def backward_of(model, numbers: Sequence[int]) -> float:
            step = [pairs[number] for number in numbers], [reference[number] for number in numbers]
            return pair_backward(model, *step)

        return backward_of


@pytest.fixture(scope="session")
def planned_pairs(odd_folder, pairs_file, tmp_path_factory) -> list[list[int]]:
    """Numbers of the pairs of every step."""
    return planned(PreferenceDataModule, odd_folder, pairs_file, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def expected_of_pairs(odd_folder, pairs_file, planned_pairs) -> TrainedOnPairs:
    """The results that preference tuning must give."""
    trained = TrainedOnPairs(odd_folder, pairs_file, planned_pairs, LEARNING_RATE, WARMUP, CLIP, 1e-4)
    assert all(norm > 1.5 * CLIP for norm in trained.norms), "clipping is active in every step"
    return trained


@pytest.fixture(scope="session")
def pair_args(fit_args, pairs_file):
    """Makes the arguments of a run that must give the results of `expected_of_pairs`; the strategy is to be added."""

    def make(root: Path, *more: object) -> list[object]:
        common = fit_args(root, 1e-4)
        common[common.index("--data.train_files") + 1] = pairs_file
        return [*common[:2], *PREFERENCE, *common[2:], *more]

    return make
