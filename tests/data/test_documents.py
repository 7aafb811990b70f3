"""Documents on their way from files to micro-batches, and what is done with them beside instruction rows."""

import json
import lzma
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BloomForCausalLM

from firefly_lightning import FireflyDataModule, FireflyError
from firefly_lightning.data.sources.row_forms import RowReader, RowRules, read_rows
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.model.fast_bloom import FastBloom
from tests.conftest import write_rows
from tests.support.helpers import fit, logged, one_line, run


@pytest.fixture(scope="module")
def texts(reviews) -> list[str]:
    """Real texts of very different lengths: single reviews, and eight of them as one."""
    long = ["\n".join(reviews[at : at + 8]) for at in range(0, 64, 8)]
    return [text for pair in zip(long, reviews[100:108], strict=True) for text in pair]


@pytest.fixture(scope="module")
def documents(texts, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("documents") / "texts.jsonl", [{"text": text} for text in texts])


def data_of(model_folder, tmp_path, **arguments) -> FireflyDataModule:
    data = FireflyDataModule(str(model_folder), cache_dir=str(tmp_path / "cache"), **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("stride", [1, 16])
def test_every_token_of_every_text_is_learned_once(model_folder, texts, documents, tmp_path, stride):
    data = data_of(model_folder, tmp_path, train_files=str(documents), max_length=64, stride=stride)
    rows = data.train.rows
    taught = defaultdict(list)
    for row in range(len(rows)):
        ids, learned = rows[row]
        assert len(ids) <= 64
        line = int(rows.describe(row).rsplit(":", 1)[1].split()[0])
        taught[line - 1] += ids[learned].tolist()
    tokenizer = load_tokenizer(str(model_folder))
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in texts]
    assert [taught[line] for line in range(len(texts))] == expected
    counts = rows.counts[0]["Text"]
    assert (counts["rows"], counts["windows"], counts["truncated"]) == (len(texts), len(rows), 0)
    assert counts["target_tokens"] == sum(map(len, expected))
    assert len(rows) > 2 * len(texts), "there are windows"
    assert rows.describe(1) == f"{documents}:1 (Text, window 2)"


def test_documents_and_instructions_share_a_run(model_folder, rows_file, documents, tmp_path):
    """Each file by its weight; each kind is measured by itself."""
    arguments = [
        "--data.train_files", json.dumps([str(rows_file), {"path": str(documents), "weight": 0.5}]),
        "--data.val_files", json.dumps([str(rows_file), str(documents)]), "--data.max_length", 64,
        "--data.batch_size", 4, "--trainer.max_steps", 3, "--trainer.val_check_interval", 3,
    ]  # fmt: skip
    fit(model_folder, rows_file, tmp_path, *arguments)
    assert "val_perplexity_of/Text" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text("utf-8")
    assert len(logged(tmp_path)) == 3


def test_the_loss_is_that_of_stock_bloom_with_labels_like_inputs(model_folder, documents, tmp_path):
    """Of whole documents of different lengths in one step: stock Bloom has them one by one, in a call for each."""
    fit(
        model_folder, documents, tmp_path, "--data.batch_size", 8, "--data.max_length", 4096, "--trainer.max_steps", 1,
        "--model.warmup_steps", 0,
    )  # fmt: skip
    data = data_of(model_folder, tmp_path, train_files=str(documents), max_length=4096, batch_size=8)
    model = BloomForCausalLM.from_pretrained(model_folder).float()
    total = count = 0
    for row in data.train.plan.rows(0):
        ids = torch.tensor(data.train.rows[row].input_ids.astype(np.int64))[None]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert float(logged(tmp_path)[0]) == pytest.approx(total / count, rel=1e-5)


def test_attention_never_crosses_the_end_of_a_document(model_folder, documents, tmp_path):
    """The loss of one document stays to the last bit what it is when those beside it are others."""
    data = data_of(model_folder, tmp_path, train_files=str(documents), max_length=256, batch_size=4)
    model = BloomForCausalLM.from_pretrained(model_folder).float()
    bloom, rows = FastBloom(model), data.train.plan.rows(0)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        nlls = bloom.target_scores(batch).nlls
        first = batch["target_positions"] // batch["input_ids"].shape[1] == 0
        others = batch["input_ids"].clone()
        others[1:] = torch.where(batch["attention_mask"][1:].bool(), others[1:].roll(7, 1) % 90 + 5, others[1:])
        changed = bloom.target_scores({**batch, "input_ids": others}).nlls
        alone = model(batch["input_ids"][:1, : batch["lengths"][0]]).logits[0, :-1]
    assert len(rows) == 4
    assert torch.equal(nlls[first], changed[first])
    assert not torch.equal(nlls[~first], changed[~first])
    ids = batch["input_ids"][0, 1 : batch["lengths"][0]]
    expected = F.cross_entropy(alone, ids, reduction="none")[-int(first.sum()) :]
    assert torch.allclose(nlls[first], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_document_is_on_one_side_of_a_split(model_folder, documents, tmp_path, fraction):
    data = data_of(
        model_folder, tmp_path, train_files=str(documents), max_length=32, val_fraction=fraction, batch_size=4
    )
    sides = [
        {data.train.rows.describe(int(row)).split(" ")[0] for part in batches.plan.sources for row in part.rows}
        for batches in (data.train, data.val)
    ]
    assert not sides[0] & sides[1]
    assert all(sides)
    taken = sum(len(part.rows) for batches in (data.train, data.val) for part in batches.plan.sources)
    assert taken == len(data.train.rows)


def test_one_document_cannot_be_on_two_sides(model_folder, documents, tmp_path):
    whole = tmp_path / "whole.txt"
    whole.write_text(documents.read_text("utf-8"), "utf-8")
    own = {"train_files": str(whole), "max_length": 32, "document_per": "file", "val_fraction": 0.5}
    with pytest.raises(FireflyError, match=r"val_fraction 0\.5 of \d+ rows, windows of 1 documents, leaves one side"):
        data_of(model_folder, tmp_path, **own)


def test_text_files_are_documents(tmp_path):
    content = "第一篇\r\n\n  第二篇 \n\n"
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    plain.write_bytes(content.encode())
    packed.write_bytes(lzma.compress(content.encode("utf-16")))
    for path in (plain, packed):
        rows = list(RowReader(str(path)))
        assert [(row.kind, row.turns, row.number, row.document) for row in rows] == [
            ("Text", (("", "第一篇"),), 1, True),
            ("Text", (("", "  第二篇 "),), 3, True),
        ]
        (whole,) = RowReader(str(path), RowRules(document_per="file"))
        assert whole.turns == (("", "第一篇\n\n  第二篇 "),)
    plain.write_text(" \n\n", "utf-8")
    for per in ("line", "file"):
        with pytest.raises(FireflyError, match=r"a\.txt: has no rows"):
            list(RowReader(str(plain), RowRules(document_per=per)))


def contents(fields):
    return (fields.get("kind", "Page"), fields["content"]) if "content" in fields else None


def test_a_document_of_a_form_of_ones_own(tmp_path):
    rows = [{"content": "第一篇"}, {"content": " ", "kind": "K"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    reader = RowReader(str(path), RowRules(row_format=contents, counting_faults=True))
    assert [(row.kind, row.turns, row.document) for row in reader] == [("Page", (("", "第一篇"),), True)]
    assert reader.faults == {"empty": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(({"text": value}, "field 'text' must be a string") for value in (None, 5, True, [], ["第一篇"], {})),
        *(({"text": value}, "the text is empty") for value in ("", " ", "\u3000\n")),
        ({"text": "\ud800"}, "half a surrogate pair"),
        ({"title": "标题"}, "none of the accepted forms"),
        ({"text": "酒店不错", "label": "好评"}, "there is text beside 'text', in label; make instruction rows"),
        ({"text": "酒店不错", "meta": {}, "summary": "不错", "note": "x"}, "in summary, note;"),
    ],
)
def test_what_is_no_document(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"text": "正文"}, row)), "utf-8")
    with pytest.raises(FireflyError, match=r"rows\.jsonl:2") as raised:
        list(read_rows(str(path)))
    assert message in str(raised.value)
    reader = RowReader(str(path), RowRules(counting_faults=True))
    assert len(list(reader)) == sum(reader.faults.values()) == 1


@pytest.mark.parametrize("most", [2, 3, 512])
def test_the_shortest_texts_are_learned_and_measured(tiny_folder, tmp_path, most):
    """Of one token, and of what looks like special tokens and is text like any other."""
    texts = ["a", "</s>", "<s></s><pad>", "</s></s>"]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    own = ["--data.val_files", file, "--data.max_length", most, "--data.batch_size", 2, "--trainer.max_steps", 2]
    fit(tiny_folder, file, tmp_path, *own, "--trainer.val_check_interval", 1, "--model.warmup_steps", 0)
    losses = [float(loss) for name in ("train_loss", "val_loss") for loss in logged(tmp_path, name).values()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    rows = data_of(tiny_folder, tmp_path, train_files=str(file), max_length=most).train.rows
    encode = load_tokenizer(str(tiny_folder)).backend_tokenizer
    encode.encode_special_tokens = True
    lengths = [len(encode.encode(text, add_special_tokens=False).ids) for text in texts]
    assert lengths[:2] == [1, 4]
    assert rows.counts[0]["Text"]["target_tokens"] == sum(lengths) + len(texts)


def test_texts_without_room_are_told(tiny_folder, tmp_path):
    file = write_rows(tmp_path / "texts.jsonl", [{"text": "正文"}])
    result = fit(tiny_folder, file, tmp_path, "--data.max_length", 1, check=False)
    assert "no row has a target within 1 tokens" in one_line(result)


def test_where_a_text_was_found_is_named_and_not_learned(tmp_path):
    rows = [
        {"text": "正文", "title": "标题", "url": "http://x", "meta": {"a": "b"}, "id": 7, "label": 1, "kind": "Wiki"}
    ]
    reader = RowReader(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert [(row.kind, row.turns) for row in reader] == [("Wiki", (("", "正文"),))]
    assert reader.unused == {"title": 1, "url": 1, "meta": 1}


def test_documents_are_measured_and_never_answered(model_folder, rows_file, documents, tmp_path):
    """`test` answers the questions of a file that has both; `predict` passes over documents or names them."""
    asked = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()][:3]
    texts = [json.loads(line) for line in documents.read_text("utf-8").splitlines()][:3]
    mixed = write_rows(tmp_path / "mixed.jsonl", [row for pair in zip(texts, asked, strict=True) for row in pair])
    common = [
        "--model.path", model_folder, "--data.max_length", 512, "--data.batch_size", 4, "--trainer.accelerator", "cpu",
        "--model.decoding.max_new_tokens", 3,
    ]  # fmt: skip
    run("firefly-fit", "test", *common, "--data.test_files", mixed, "--trainer.default_root_dir", tmp_path / "test")
    (written,) = (tmp_path / "test").rglob("predictions.jsonl")
    assert [json.loads(line)["input"] for line in written.read_text("utf-8").splitlines()] == [
        row["input"] for row in asked
    ]
    line = one_line(
        run("firefly-fit", "predict", *common, "--data.predict_files", mixed, "--trainer.default_root_dir",
            tmp_path / "predict", check=False)
    )  # fmt: skip
    assert f"{mixed}:1: a text is learned as it is and asks nothing" in line
    assert not (tmp_path / "predict").exists()


@pytest.mark.parametrize("stride", [0, 64])
def test_a_stride_must_leave_room(model_folder, documents, stride):
    with pytest.raises(FireflyError, match=r"data\.stride"):
        FireflyDataModule(str(model_folder), train_files=str(documents), max_length=64, stride=stride)
