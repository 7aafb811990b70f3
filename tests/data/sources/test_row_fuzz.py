"""Any JSON value in any field of any form: a row is read or refused in one line, and nothing of it is lost unsaid.

``FIREFLY_FUZZ_SECONDS=3600 pytest -s tests/data/sources/test_row_fuzz.py`` looks for an hour.
"""

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly_lightning.data import datamodule
from firefly_lightning.data.datamodule import FireflyDataModule
from firefly_lightning.data.sources.any_record import read_leniently
from firefly_lightning.data.sources.known_forms import form_of
from firefly_lightning.data.sources.row_forms import Row, RowReader, RowRules, read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.evaluation import predictions
from firefly_lightning.preparation import figures
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.stats import stats
from firefly_lightning.prompt import PRESETS, PromptEncoder
from firefly_lightning.pruning.vocabulary import count_tokens, read_texts
from tests.support.fuzzed_rows import DOCUMENT, FORMS, RECORD

SECONDS = float(os.environ.get("FIREFLY_FUZZ_SECONDS", "0"))


def texts_in(value: Any, within: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Each text in a value that is more than blanks, with the names of the fields that it lies in."""
    if isinstance(value, str):
        return [(within, value)] if value.strip() else []
    if isinstance(value, dict):
        return [one for name, inner in value.items() for one in texts_in(inner, (*within, name))]
    return [one for inner in value for one in texts_in(inner, within)] if isinstance(value, list) else []


def check_kept(fields: dict[str, Any], row: Row, unused: set[str]) -> None:
    """Checks that each text of a row that was read is learned or asked, or that its field is named as not read."""
    read = [text for turn in row.turns for text in turn]
    for within, text in texts_in(fields, ()):
        names = {".".join(within[:depth]) for depth in (1, 2, 3)}
        if {name.encode("utf-8", "backslashreplace").decode() for name in names} & unused:
            continue
        if within == ("kind",) or (len(within) > 1 and within[-1] in ("role", "from", "type")):
            continue
        pieces = [piece for piece in text.split("</s>") if piece.strip()] if within == ("target",) else [text]
        lost = [piece for piece in pieces if not any(piece in one for one in read)]
        assert len(lost) <= row.unanswered, (fields, lost)


def one_line_of(error: FireflyError) -> None:
    message = str(error)
    message.encode()
    assert "\n" not in message, message
    assert len(message) < 1500, message


def check_readers(path: Path, fields: dict[str, Any]) -> Row | None:
    """Checks one row by itself; returns it as training takes it, or None."""
    path.write_text(json.dumps(fields) + "\n")
    said, reader, rows, refused = read_leniently(fields), RowReader(str(path)), [], ""
    try:
        rows = list(reader)
    except FireflyError as error:
        one_line_of(error)
        refused = str(error)
    if refused:
        empty = any(not answer.strip() for _, answer in said.turns)
        assert said.fault or empty or not said.turns or "'kind' is missing" in refused, (fields, refused)
    else:
        check_kept(fields, rows[0], set(reader.unused))
        assert (said.fault, said.turns, said.kind or "") == (None, rows[0].turns, rows[0].kind)
    for rules in (RowRules(answering=True), RowRules(learn="last", answering=True)):
        with contextlib.suppress(FireflyError):
            (asked,) = RowReader(str(path), rules)
            assert not asked.learned or any(asked.learned), "a row that is to be answered has a question"
            assert len(asked.learned) in (0, len(asked.turns))
    return rows[0] if rows else None


def check_clean(path: Path, records: list[dict[str, Any]], taken: list[Row | None], beside: list[dict]) -> None:
    """Checks that cleaning counts every row, and writes as they were only rows that training takes, or raw ones."""
    good = {"kind": "K", "input": "第一问", "target": "第一答"}
    path.write_text("".join(json.dumps(fields) + "\n" for fields in [good, *records]))
    counting = RowReader(str(path), RowRules(counting_faults=True))
    assert len(list(counting)) + sum(counting.faults.values()) == 1 + len(records)
    path.write_text("".join(json.dumps(fields) + "\n" for fields in records))
    out, validation = path.with_name("out.jsonl"), path.with_name("validation.jsonl")
    out.unlink(missing_ok=True)
    validation.write_text("".join(json.dumps(fields) + "\n" for fields in beside))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            clean([str(path)], str(out), [str(validation)] if beside else None)
    except FireflyError as error:
        one_line_of(error)
        assert not out.exists()
        return
    report = json.loads(out.with_name("out.jsonl.report.json").read_text("utf-8"))
    assert sum(report["counts"]["all"].values()) == 2 * len(records)
    kept = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert len(kept) == report["counts"]["all"]["kept"]
    written = iter(json.dumps(fields) for fields in records)
    assert all(any(json.dumps(row) == one for one in written) for row in kept)
    acceptable = {
        json.dumps(fields) for fields, ok in zip(records, taken, strict=True) if ok or form_of(fields) is None
    }
    assert {json.dumps(row) for row in kept} <= acceptable


def told(function: Callable[[], Any]) -> Any:
    """What a function returns, or None where it refuses its rows in one line; what it prints is left out."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return function()
        except FireflyError as error:
            one_line_of(error)
            return None


def data_module(folder: Path, tokenizer: Any, **how: Any) -> FireflyDataModule:
    """A data module whose tokenizer is loaded."""
    data = FireflyDataModule(str(folder), prompt="firefly", **how)
    data.__dict__["tokenizer"] = tokenizer
    return data


def check_training(path: Path, taken: list[Row | None], folder: Path, tokenizer: Any, cut: tuple[int, str]) -> None:
    """Checks that training and validation take every token of every row that the reader takes, or count its loss."""
    for max_length, too_long in [(4096, "truncate"), cut]:
        how = {"max_length": max_length, "too_long": too_long, "batch_size": 2}
        data = data_module(folder, tokenizer, train_files=str(path), val_files=str(path), **how)
        made = told(lambda data=data: (data.prepare_data(), data.setup("fit")))
        learned = [row for row in taken if row and (any(row.learned) or not row.learned)]
        if None in taken or not learned or made is None:
            assert made is None
            assert None in taken or not learned or max_length < 4096
            continue
        counts = [sum(of[name] for of in data.val.rows.counts[0].values()) for name in ("rows", "dropped", "no_target")]
        windows = sum(of["windows"] for of in data.val.rows.counts[0].values())
        assert counts[0] == len(taken)
        documents = sum(row.document for row in learned)
        assert len(taken) - documents + windows == len(data.val.rows) + sum(counts[1:])
        for batches in (data.train, data.val):
            found = [one for index in range(len(batches)) for one in texts_of_batch(batches[index], tokenizer)]
            assert sorted(row for row, _, _ in found) == list(range(len(data.val.rows)))
            if max_length == 4096:
                expected = sorted(learned, key=lambda row: row.document)  # documents follow the other rows of a batch
                assert [texts for _, *texts in sorted(found)] == list(map(texts_to_learn, expected))


def texts_of_batch(batch: Any, tokenizer: Any) -> list[tuple[int, str, str]]:
    """Number, whole text and learned text of every row of a micro-batch."""
    width = batch["input_ids"].shape[1]
    of_row = batch["target_positions"] // width
    return [
        (
            int(row),
            tokenizer.decode(batch["input_ids"][index][: batch["lengths"][index]]),
            tokenizer.decode(batch["target_ids"][of_row == index]),
        )
        for index, row in enumerate(batch["rows"])
    ]


def texts_to_learn(row: Row) -> list[str]:
    """The whole and the learned text of a row, as the README gives the format."""
    if row.document:
        return [f"<s>{row.turns[0][1]}</s>", f"{row.turns[0][1]}</s>"]
    learned = row.learned or (True,) * len(row.turns)
    (question, answer), *later = row.turns
    turns = "".join(f"{asked}</s>{said}</s>" for asked, said in later)
    targets = "".join(f"{said}</s>" for (_, said), one in zip(row.turns, learned, strict=True) if one)
    return [f"<s>{question}</s></s>{answer}</s>{turns}", targets]


def check_predict(path: Path, records: list[dict[str, Any]], folder: Path, tokenizer: Any) -> None:
    """Checks that every row with a question is answered once, and that its question is asked whole."""
    asked = told(lambda: list(RowReader(str(path), RowRules(answering=True))))
    data = data_module(folder, tokenizer, predict_files=str(path), batch_size=3)
    told(lambda: data.setup("predict"))
    if asked is None:
        assert not hasattr(data, "answered")
        return
    assert len(asked) == len(records) == len(data.answered.rows)
    encoder = PromptEncoder(tokenizer, PRESETS["firefly"])
    file = predictions.PredictionFile(path.with_name("answers"), 0, [str(path)])
    with mock.patch.object(predictions, "answer_prompts", lambda model, encoder, prompts, *_: ["答"] * len(prompts)):
        for index in range(len(data.answered)):
            file.write(predictions.predict(None, encoder, data.answered[index], data.answered.rows.kinds))
    file.close()
    file.join(1)
    written = [json.loads(line) for line in file.path.read_text("utf-8").split("\n")[:-1]]
    assert len(written) == len(asked)
    for row, answer in zip(asked, written, strict=True):
        first = row.learned.index(True) if row.learned else 0
        question, target = row.turns[first]
        assert (answer["kind"], answer["target"], answer["generated"]) == (row.kind, target, "答")
        assert answer["input"].endswith(question)
        assert first or answer["input"] == question


def check_stats(path: Path, taken: list[Row | None], folder: Path, tokenizer: Any, draws: bool) -> None:
    """Checks that every row is in the figures, or counted as refused or as without anything to learn."""
    out = path.with_name("stats")
    with contextlib.ExitStack() as patches:
        for name in () if draws else ("draw_tasks", "draw_lengths"):
            patches.enter_context(mock.patch.object(figures, name))
        patches.enter_context(mock.patch("firefly_lightning.huggingface.load_tokenizer", return_value=tokenizer))
        told(lambda: stats([str(path)], str(folder), str(out), max_length=4096, batch_size=2))
    if not out.exists():
        assert not any(row and (any(row.learned) or not row.learned) for row in taken) or form_of(first(path)) is None
        return
    report = json.loads((out / "stats.json").read_text("utf-8"))
    of_all = report["kinds"]["all"]
    assert of_all["rows"] + of_all["no_target"] + sum(report["refused"].values()) == len(taken)
    assert sum(report["refused"].values()) == taken.count(None)
    assert sum(of["rows"] for kind, of in report["kinds"].items() if kind != "all") == of_all["rows"]


def first(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text().split("\n")[0])


def check_prune(path: Path, taken: list[Row | None], tokenizer: Any) -> None:
    """Checks that pruning counts the tokens of all texts of the rows that training takes, and refuses others."""
    texts = told(lambda: list(read_texts(str(path))))
    if texts is None:
        assert None in taken
        return
    assert texts == [text for row in taken if row for turn in row.turns for text in turn if text]
    counts = told(lambda: count_tokens(tokenizer, [str(path)]))
    if counts is not None:  # a token of a byte-level vocabulary has a character for each byte
        sizes = {index: len(token) for token, index in tokenizer.get_vocab().items()}
        assert sum(sizes[index] * int(count) for index, count in enumerate(counts)) == len("".join(texts).encode())


def check_array(path: Path, records: list[dict[str, Any]], taken: list[Row | None]) -> None:
    """Checks that rows of a JSON array are those of lines."""
    array = path.with_suffix(".json")
    array.write_text(json.dumps(records, indent=1))
    rows = told(lambda: list(read_rows(str(array))))
    assert rows == (None if None in taken else [row._replace(number=at) for at, row in enumerate(taken, 1)])


def test_any_value_in_any_field_is_read_or_told(tmp_path, tokenizer, tiny_folder, monkeypatch):
    made, path = [0, 0], tmp_path / "rows.jsonl"
    cuts = st.tuples(st.sampled_from([2, 5, 9, 20]), st.sampled_from(["truncate", "truncate_keep_end", "drop"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datamodule, "rank_zero_info", str)  # tables of thousands of files

    @settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None, deadline=None)
    @given(st.lists(RECORD, min_size=1, max_size=4), st.lists(RECORD, max_size=2), cuts, st.integers(0, 50))
    def check(records: list[dict[str, Any]], beside: list[dict], cut: tuple[int, str], number: int) -> None:
        made[0] += 1
        made[1] += len(records)
        for name in ("cache", "answers", "stats"):  # what is left of a file that failed is none of this one's
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        taken = [check_readers(path, fields) for fields in records]
        check_clean(path, records, taken, beside)
        check_array(path, records, taken)
        check_training(path, taken, tiny_folder, tokenizer, cut)
        check_predict(path, records, tiny_folder, tokenizer)
        check_stats(path, taken, tiny_folder, tokenizer, draws=number == 7)
        check_prune(path, taken, tokenizer)

    end = time.monotonic() + SECONDS
    check()
    while time.monotonic() < end:
        check()
        print(f"{made[0]} files of {made[1]} rows", flush=True)


def test_forms_of_the_fuzz_are_those_that_are_read(tmp_path):
    """A form without a row in the fuzz would be tested by nobody."""
    listed = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    examples = [{name: listed if len(form) == 1 and form != DOCUMENT else "问" for name in form} for form in FORMS]
    assert {form_of(row).shown for row in examples} == {form.shown for form in all_forms()}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    assert len(list(read_rows(str(path)))) == len(FORMS)


def all_forms():
    from firefly_lightning.data.sources import known_forms

    return known_forms._FORMS
