"""Answers to many prompts, a bounded number at a time: a row that is done leaves its place to one that waits."""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from firefly_lightning.evaluation.token_choice import TokenChoice
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.key_value_cache import KeyValueCache


class Row:
    """A prompt and its answer, as far as that is there.

    Args:
        prompt: Token ids up to where the answer begins.
        about: What the caller knows the row by.
        seed: Makes the tokens that are drawn repeatable, whatever other rows are in flight; by default they depend on
            PyTorch's random state.

    Attributes:
        answer: Token ids of the answer, without the token that ends it.
        done: Whether the answer is whole.
    """

    def __init__(self, prompt: Sequence[int], about: Any = None, seed: int | None = None) -> None:
        self.prompt, self.about = list(prompt), about
        self.answer: list[int] = []
        self.done = False
        self._random = random.Random(int(torch.randint(2**62, ())) if seed is None else seed)
        self._seen = dict.fromkeys(self.prompt)

    @property
    def length(self) -> int:
        """Number of tokens that are there."""
        return len(self.prompt) + len(self.answer)

    @property
    def seen(self) -> list[int]:
        """The different tokens that are there."""
        return list(self._seen)

    def draw(self) -> float:
        """The row's next random number, from 0 up to 1."""
        return self._random.random()

    def take(self, token: int, end: int, most: int) -> None:
        """Adds a token to the answer, or ends it."""
        if token != end:
            self.answer.append(token)
            self._seen[token] = None
        self.done = token == end or len(self.answer) == most


class RowsInFlight:
    """Generates the answers to rows together. A greedy answer is the one that its row would get alone.

    Args:
        bloom: The model, whole on this device.
        choice: How tokens are chosen.
        eos_token_id: The token that ends an answer.
        places: Most rows that are computed at a time.

    Attributes:
        choice: How tokens are chosen.
    """

    def __init__(self, bloom: FastBloom, choice: TokenChoice, eos_token_id: int, places: int) -> None:
        self.choice, self._end, self._places = choice, eos_token_id, places
        self._cache = KeyValueCache(bloom, places)
        self._rows: list[Row] = []  # by place
        self._waiting: deque[Row] = deque()

    def add(self, rows: Iterable[Row]) -> None:
        """Has rows answered, once there is place for them."""
        self._waiting.extend(rows)

    def answered(self, rest: bool) -> Iterable[Row]:
        """Goes on until no row waits for a place, or to the end of the ``rest``; gives rows as they are done."""
        while self._waiting or (rest and self._rows):
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Adds a token to every answer that is under way, and lets rows in that wait; gives the rows that are done."""
        done = []
        if self._rows:
            logits = self._cache.step([row.answer[-1] for row in self._rows], [row.length - 1 for row in self._rows])
            done += self._choose(0, logits)
        while self._waiting and len(self._rows) < self._places:
            place = len(self._rows)
            self._rows.append(self._waiting.popleft())
            done += self._choose(place, self._cache.fill(place, self._rows[place].prompt)[None])
        return done

    def _choose(self, first: int, logits: Tensor) -> list[Row]:
        """Chooses a token for each row from a place on; those that are then done leave their places."""
        rows = self._rows[first:]
        draws = torch.tensor([row.draw() for row in rows], device=logits.device)
        early = [at for at, row in enumerate(rows) if len(row.answer) < self.choice.min_new_tokens]
        logits[early, self._end] = -torch.inf
        chosen = self.choice.choose(logits, self._seen(rows, logits.device), draws)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.take(token, self._end, self.choice.max_new_tokens)
        for place in reversed(range(first, len(self._rows))):
            if self._rows[place].done:
                self._leave(place)
        return [row for row in rows if row.done]

    def _leave(self, place: int) -> None:
        """Gives a place to the row in the last one, so that those under way are always in the first places."""
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last
            self._cache.move(len(self._rows), place, last.length - 1)

    def _seen(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        """(rows, most) the tokens that each row has; one of its own fills the places behind, and changes nothing."""
        seen = [row.seen for row in rows] if self.choice.repetition_penalty != 1 else [row.prompt[:1] for row in rows]
        most = max(map(len, seen))
        return torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in seen], device=device)
