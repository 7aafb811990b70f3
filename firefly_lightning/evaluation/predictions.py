"""Answers to the rows of micro-batches, and the file that they end up in."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypedDict

from transformers import BloomForCausalLM, GenerationConfig

from firefly_lightning.data.batches import MicroBatch, first_turns
from firefly_lightning.errors import FireflyError
from firefly_lightning.evaluation.generation import answer_prompts, decode_answer
from firefly_lightning.evaluation.rows_in_flight import Row, RowsInFlight
from firefly_lightning.evaluation.token_choice import TokenChoice
from firefly_lightning.files.atomic import check_new_file, whole_file
from firefly_lightning.interrupts import before_end
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.prompt import PromptEncoder

FILE_NAME = "predictions.jsonl"


class Prediction(TypedDict):
    """A row and the answer to its first input.

    Attributes:
        row: Number of the row, counted from 0 through all files.
        kind: Kind of the row.
        input: The text that was answered.
        target: The first target of the row.
        generated: The model's answer.
    """

    row: int
    kind: str
    input: str
    target: str
    generated: str


class Predictor:
    """Answers the rows of micro-batches with a model that is whole on this device, as many at a time as one has.

    A row that is done makes room for one of the next micro-batch, so that some are answered only while later ones are.

    Args:
        bloom: The model that answers.
        encoder: Decodes the rows; it has the format that they were encoded in.
        choice: How tokens are chosen.
        seed: From the number of a row the seed of its answer, which then depends on nothing else.
    """

    def __init__(
        self, bloom: FastBloom, encoder: PromptEncoder, choice: TokenChoice, seed: Callable[[int], int]
    ) -> None:
        self._bloom, self._encoder, self._choice, self._seed = bloom, encoder, choice, seed
        self._in_flight: RowsInFlight | None = None

    def answer(self, batch: MicroBatch, kinds: Sequence[str], last: bool) -> list[Prediction]:
        """Answers to rows of this micro-batch and of those before, as far as they are done.

        Args:
            batch: The rows.
            kinds: Names of the kinds, by the numbers in ``batch["kinds"]``.
            last: Whether all rows are to be answered now.
        """
        if self._in_flight is None:
            places = max(1, len(batch["rows"]))
            self._in_flight = RowsInFlight(self._bloom, self._choice, self._encoder.eos_token_id, places)
        asked = _asked(batch, self._encoder, kinds)
        self._in_flight.add(Row(prompt, row, self._seed(row["row"])) for prompt, row in asked)
        done = self._in_flight.answered(rest=last)
        return [row.about | {"generated": decode_answer(self._encoder, row.answer)} for row in done]


def predict(
    model: BloomForCausalLM,
    encoder: PromptEncoder,
    batch: MicroBatch,
    kinds: Sequence[str],
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    in_step: bool = False,
) -> list[Prediction]:
    """Answers the rows of a micro-batch, all together, by Hugging Face's own generation.

    Args:
        model: The model that answers.
        encoder: Decodes the rows; it has the format that they were encoded in.
        batch: The rows; a micro-batch without any gives no answers, but takes part in the step of the other ranks.
        kinds: Names of the kinds, by the numbers in ``batch["kinds"]``.
        generation_config: Settings of generation; ``default_decoding`` of the model by default.
        seed: Makes the answers repeatable.
        in_step: Whether all ranks must run the model equally often.
    """
    asked, device = _asked(batch, encoder, kinds), batch["input_ids"].device
    prompts = [prompt for prompt, _ in asked]
    answers = answer_prompts(model, encoder, prompts, generation_config, seed, in_step, device)
    return [{**row, "generated": answer} for (_, row), answer in zip(asked, answers, strict=True)]


def _asked(batch: MicroBatch, encoder: PromptEncoder, kinds: Sequence[str]) -> list[tuple[list[int], Prediction]]:
    """For each row that asks something, the token ids of its prompt, and its prediction without the answer.

    Inputs and targets are decoded from the tokens of the rows, so they are whole where the row was not cut.
    """
    numbers = (batch[name].tolist() for name in ("rows", "kinds", "asks"))
    rows = zip(first_turns(batch), *numbers, strict=True)
    asked: list[tuple[list[int], Prediction]] = []
    for (prompt, target_ids), row, kind, asks in rows:
        if not asks:
            continue
        source, target = encoder.decode_turn(prompt, target_ids)
        asked.append((prompt, {"row": row, "kind": kinds[kind], "input": source, "target": target, "generated": ""}))
    return asked


class PredictionFile:
    """``predictions.jsonl`` of a run: every rank writes its part as it goes, one rank joins the parts.

    Parts are hidden files in the same folder, which are removed when ``predictions.jsonl`` is complete. Only a killed
    run leaves them.

    Args:
        folder: Folder of the run, the same for all ranks.
        rank: Rank of this process.
        inputs: Files of the rows that are answered.

    Raises:
        FireflyError: If ``predictions.jsonl`` is one of the inputs.
    """

    def __init__(self, folder: Path, rank: int, inputs: Sequence[str]) -> None:
        self.path = folder / FILE_NAME
        check_new_file(self.path, inputs)
        folder.mkdir(parents=True, exist_ok=True)
        self._part: BinaryIO = self._part_path(rank).open("wb")
        before_end(self.discard)

    def write(self, predictions: Iterable[Prediction]) -> None:
        """Adds answers to this rank's part, in any order."""
        for prediction in predictions:
            self._part.write(json.dumps(prediction, ensure_ascii=False).encode() + b"\n")
        self._part.flush()

    def close(self) -> None:
        """Ends this rank's part."""
        self._part.flush()
        os.fsync(self._part.fileno())
        self._part.close()

    def discard(self) -> None:
        """Removes this rank's part when the run ends early."""
        self._part.close()
        Path(self._part.name).unlink(missing_ok=True)

    def join(self, world_size: int) -> None:
        """Writes the answers of all ranks in the order of their rows, once every rank has closed its part.

        Each row is written once, although ranks that split a model have answered the same rows.

        Raises:
            FireflyError: If a part is missing.
        """
        paths = [self._part_path(rank) for rank in range(world_size)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise FireflyError(
                f"{self.path.parent}: {missing[0]} of another machine is not here; "
                "choose a trainer.default_root_dir that all machines share"
            )
        with whole_file(self.path) as file:
            for path, start in _in_order(paths):
                with path.open("rb") as part:
                    part.seek(start)
                    prediction = json.loads(part.readline())
                del prediction["row"]
                file.write(json.dumps(prediction, ensure_ascii=False).encode() + b"\n")
        for path in self.path.parent.glob(f".{FILE_NAME}.rank*"):
            path.unlink()

    def _part_path(self, rank: int) -> Path:
        return self.path.with_name(f".{FILE_NAME}.rank{rank}")


def _in_order(paths: Sequence[Path]) -> list[tuple[Path, int]]:
    """The part and the byte at which each row begins, in the order of rows; their texts need not fit into memory."""
    found: dict[int, tuple[Path, int]] = {}
    for path in paths:
        start = 0
        with path.open("rb") as part:
            for line in part:
                found.setdefault(json.loads(line)["row"], (path, start))
                start += len(line)
    return [found[row] for row in sorted(found)]
