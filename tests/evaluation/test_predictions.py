"""firefly-fit predict: an answer to every row, in the order of the files, complete or absent."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import BloomForCausalLM

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.data.batches import collate, first_turns
from firefly_lightning.data.tokenized_rows import TokenizedRow
from firefly_lightning.errors import FireflyError
from firefly_lightning.evaluation.predictions import PredictionFile
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.prompt import PRESETS, PromptEncoder
from tests.conftest import write_rows
from tests.support.helpers import fit, one_line, raised_line, run
from tests.support.predicting import DECODING, GREEDY, answers, predicted, teach


def predict(model: Path, root: Path, *args: object, **kwargs):
    common = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.batch_size", 4]
    own = ["--model.path", model, "--trainer.default_root_dir", root]
    return run("firefly-fit", "predict", *common, *own, *args, **kwargs)


@pytest.fixture(scope="module")
def rows(rows_file, tmp_path_factory) -> Path:
    """Of different lengths and numbers of turns, in no order."""
    lines = rows_file.read_text("utf-8").splitlines()[:9]
    return write_rows(tmp_path_factory.mktemp("rows") / "九.jsonl", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def more_rows(tmp_path_factory) -> Path:
    """Special tokens typed in texts, and a row far longer than data.max_length."""
    typed = {"kind": "Summary", "input": "写</s>出来的<pad>", "target": "\n是 <s>。"}
    long = {"kind": "长", "input": "很长" * 400, "target": "好" * 600}
    return write_rows(tmp_path_factory.mktemp("more") / "more.jsonl", [long, typed])


@pytest.fixture(scope="module")
def taught(model_folder, rows, tmp_path_factory) -> Path:
    return teach(model_folder, rows, tmp_path_factory.mktemp("taught"))


def test_greedy_answers_are_those_of_stock_hugging_face(taught, rows, more_rows, tmp_path):
    files = ["--data.predict_files", json.dumps([str(more_rows), str(rows)])]
    predict(taught, tmp_path, *files, *DECODING)
    expected = answers(taught, [more_rows, rows])
    assert len(expected) == 11
    assert len({row["generated"] for row in expected}) > 9
    assert predicted(tmp_path, 0) == expected
    folder = tmp_path / "lightning_logs" / "version_0"
    text = (folder / "predictions.jsonl").read_text("utf-8")
    assert "\\u" not in text
    assert list(json.loads(text.splitlines()[0])) == ["kind", "input", "target", "generated"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    predict(taught, tmp_path, *files, *DECODING, "--data.micro_batch_size", 1)
    assert predicted(tmp_path, 1) == expected


def test_the_question_of_several_turns_is_the_first(taught, rows, tmp_path):
    predict(taught, tmp_path, "--data.predict_files", rows, *DECODING)
    source = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert any("</s>" in row["target"] for row in source)
    for row, found in zip(source, predicted(tmp_path, 0), strict=True):
        assert found["input"] == row["input"]
        assert found["target"] == row["target"].split("</s>")[0]


def test_sampled_answers_follow_from_the_seed(taught, rows, tmp_path):
    sampled = ["--data.predict_files", rows, "--model.decoding.temperature", 5.0, "--model.decoding.max_new_tokens", 8]
    for seed in (1, 1, 2):
        predict(taught, tmp_path, *sampled, "--seed_everything", seed)
    first, again, other = ([row["generated"] for row in predicted(tmp_path, version)] for version in range(3))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_the_models_own_decoding_is_the_default(taught, rows, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in taught.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "generation_config.json").write_text(json.dumps({**GREEDY, "max_new_tokens": 2}))
    predict(model, tmp_path, "--data.predict_files", rows)
    tokenizer = load_tokenizer(str(model))
    for found, longer in zip(predicted(tmp_path, 0), answers(taught, [rows]), strict=True):
        ids = tokenizer.encode(longer["generated"], add_special_tokens=False)[:2]
        assert found["generated"] == tokenizer.decode(ids)


def test_test_rows_and_validation_rows_stand_in(taught, rows, more_rows, tmp_path):
    files = {name: write_rows(tmp_path / f"{name}.jsonl", [row_called(name)]) for name in ("test", "val")}
    val, test = (["--data.val_files", files["val"]], ["--data.test_files", files["test"]])
    predict(taught, tmp_path, *DECODING, *val)
    predict(taught, tmp_path, *DECODING, *val, *test)
    predict(taught, tmp_path, *DECODING, *val, *test, "--data.predict_files", rows)
    assert [len(predicted(tmp_path, version)) for version in range(3)] == [1, 1, 9]
    assert [predicted(tmp_path, version)[0]["kind"] for version in range(2)] == ["val", "test"]
    predict(taught, tmp_path, *DECODING, "--data.train_files", rows, "--data.val_fraction", 0.4)
    held_out, all_rows = predicted(tmp_path, 3), answers(taught, [rows])
    assert len(held_out) == 4
    assert held_out == [row for row in all_rows if row in held_out]


def row_called(kind: str) -> dict[str, str]:
    return {"kind": kind, "input": "问", "target": "答"}


def test_nothing_to_answer(taught, rows):
    message = one_line(run("firefly-fit", "predict", "--model.path", taught, check=False))
    assert message == "data.predict_files: nothing to answer; name a file there"
    files = ["--data.predict_files", rows.with_name("none.jsonl")]
    message = one_line(run("firefly-fit", "predict", "--model.path", taught, *files, check=False))
    assert message.endswith("none.jsonl: no such file; check the path and the working folder")


@pytest.mark.parametrize(
    ("decoding", "says"),
    [
        ('{"max_new_token": 3}', "decoding.max_new_token: no such key; did you mean model.decoding.max_new_tokens?"),
        ('{"temperature": "warm"}', "model.decoding: warm is not float"),
        ('{"temperature": -1}', "model.decoding.temperature is -1.0; it must be at least 0.001"),
        ('{"top_p": 2}', "model.decoding.top_p is 2.0; it must be above 0 and at most 1"),
        ('{"num_beams": 0}', "model.decoding.num_beams is 0; it must be at least 1"),
        ('{"max_new_tokens": 0}', "model.decoding.max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_a_wrong_decoding_is_refused_before_weights_are_loaded(taught, rows, tmp_path, decoding, says):
    (tmp_path / "config.json").write_bytes((taught / "config.json").read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((taught / name).read_bytes())
    (tmp_path / "model.safetensors").write_text("nothing that can be loaded")
    result = predict(tmp_path, tmp_path, "--data.predict_files", rows, "--model.decoding", decoding, check=False)
    assert says in one_line(result)


def test_without_a_logger_the_root_has_the_file_and_a_dry_run_none(taught, rows, tmp_path):
    arguments = ["--data.predict_files", rows, *DECODING, "--trainer.logger", "false"]
    predict(taught, tmp_path, *arguments, "--trainer.fast_dev_run", "true")
    assert not list(tmp_path.rglob("*predictions*"))
    predict(taught, tmp_path, *arguments)
    predict(taught, tmp_path, *arguments)
    assert len((tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()) == 9
    assert not list(tmp_path.glob(".predictions*"))


def test_a_run_that_ends_early_leaves_earlier_predictions_and_no_part(taught, rows, tmp_path):
    (tmp_path / "predictions.jsonl").write_text("earlier\n")
    arguments = ["--data.predict_files", rows, *DECODING, "--trainer.logger", "false"]
    result = predict(taught, tmp_path, *arguments, "--model", "tests.support.predicting.Failing", check=False)
    assert one_line(result) == "enough"
    assert (tmp_path / "predictions.jsonl").read_text() == "earlier\n"
    assert not list(tmp_path.glob(".predictions*"))


def test_rows_of_ranks_are_joined_each_once(tmp_path):
    def prediction(row: int):
        return {"row": row, "kind": "A", "input": "问", "target": "答", "generated": f"第{row}个\u2028"}

    parts = [[5, 0, 2], [5, 0, 2], [], [1, 4, 3]]
    files = [PredictionFile(tmp_path, rank, []) for rank in range(4)]
    for file, part in zip(files, parts, strict=True):
        file.write(map(prediction, part))
        file.close()
    with pytest.raises(FireflyError) as raised:
        files[0].join(5)
    assert "trainer.default_root_dir that all machines share" in raised_line(raised)
    files[0].join(4)
    found = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["generated"] for row in found] == [f"第{row}个\u2028" for row in range(6)]
    assert not list(tmp_path.glob(".predictions*"))


@pytest.mark.parametrize("preset", PRESETS)
def test_first_turns_of_whole_and_cut_rows(tokenizer, preset):
    encoder = PromptEncoder(tokenizer, PRESETS[preset])
    turns = [(("你好</s>", "世界 <s>"), ("", "再见")), (("", "！"),), (("春风又绿", "江南岸"), ("明月", "何时"))]
    whole = encoder.encode(turns)
    found = first_turns(collate([TokenizedRow(*map(as_array, row)) for row in whole], encoder.pad_token_id))
    assert [encoder.decode_turn(*ids) for ids in found] == [row[0] for row in turns]
    assert [prompt for prompt, _ in found] == [encoder.encode_question([], row[0][0]) for row in turns]
    prompt, target = found[0]
    shorter = (part[: len(prompt) + len(target) - 2] for part in whole[0])
    cut = first_turns(collate([TokenizedRow(*map(as_array, shorter))], encoder.pad_token_id))
    assert encoder.decode_turn(*cut[0]) == ("你好</s>", "世界 <s")
    assert first_turns(collate([], encoder.pad_token_id)) == []


def as_array(values):
    import numpy as np

    return np.array(values)


def test_a_trainer_of_ones_own_gets_the_predictions(taught, rows):
    module = FireflyModule(str(taught), decoding=GREEDY)
    data = FireflyDataModule(str(taught), predict_files=str(rows), batch_size=4)
    batches = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).predict(module, data)
    found = sorted((row for batch in batches for row in batch), key=lambda row: row["row"])
    assert [{name: row[name] for name in row if name != "row"} for row in found] == answers(taught, [rows])


def test_a_limited_prediction_answers_all_of_its_rows(taught, rows):
    module = FireflyModule(str(taught), decoding=GREEDY)
    data = FireflyDataModule(str(taught), predict_files=str(rows), batch_size=3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_predict_batches=2)
    for _ in range(2):
        found = [row["input"] for batch in trainer.predict(module, data) for row in batch]
        assert len(found) == len(set(found)) == 6


def test_training_does_not_need_the_rows_to_answer(taught, rows, tmp_path):
    fit(taught, rows, tmp_path, "--data.predict_files", "later.jsonl", "--trainer.max_steps", 1, "--data.batch_size", 4)


def test_rows_without_targets_are_answered(taught, rows, tmp_path):
    """With the answers that the same rows get beside their targets, and stock code's to a conversation's question."""
    whole = [json.loads(line) for line in rows.read_text("utf-8").splitlines()][:4]
    bare = [{"input": whole[0]["input"]}, {**whole[1], "target": ""}, {**whole[2], "target": None}]
    bare += [{"messages": [{"role": "user", "content": whole[3]["input"]}]}]
    file = write_rows(tmp_path / "bare.jsonl", bare)
    predict(taught, tmp_path, "--data.predict_files", file, *DECODING)
    found = predicted(tmp_path, 0)
    expected = answers(taught, [write_rows(tmp_path / "whole.jsonl", whole)])
    assert [row["generated"] for row in found] == [row["generated"] for row in expected]
    assert [row["input"] for row in found] == [row["input"] for row in whole]
    assert [row["target"] for row in found] == [""] * 4
    assert [row["kind"] for row in found] == ["Firefly", whole[1]["kind"], whole[2]["kind"], "Conversation"]


def test_the_open_question_of_a_conversation_is_asked_after_its_turns(taught, tmp_path):
    system, (question, answer), last = "你是客服。", ("房间怎么样？", "很好。"), "再见"
    said = [
        {"role": "system", "content": system}, {"role": "user", "content": question},
        {"role": "assistant", "content": answer}, {"role": "user", "content": last},
    ]  # fmt: skip
    closed = [*said, {"role": "assistant", "content": "再见！"}]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": said}, {"messages": closed}])
    predict(taught, tmp_path, "--data.predict_files", file, *DECODING)
    predict(taught, tmp_path, "--data.predict_files", file, *DECODING, "--data.learn", "last")
    first = f"{system}\n{question}"
    asked = f"{first}</s></s>{answer}</s>{last}"
    open_question, closed_row = predicted(tmp_path, 0)
    assert (open_question["input"], open_question["target"]) == (asked, "")
    assert (closed_row["input"], closed_row["target"]) == (first, answer)
    assert [(row["input"], row["target"]) for row in predicted(tmp_path, 1)] == [(asked, ""), (asked, "再见！")]
    model, tokenizer = BloomForCausalLM.from_pretrained(taught).float().eval(), load_tokenizer(str(taught))
    ids = tokenizer(f"<s>{asked}</s>", add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=2, pad_token_id=3, **GREEDY)
    stock = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert [open_question["generated"], *(row["generated"] for row in predicted(tmp_path, 1))] == [stock] * 3
