"""Figures of rows against a count of their own."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager

from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.stats import stats
from tests.conftest import write_rows


@pytest.fixture
def files(tmp_path, reviews):
    rows = [
        {"kind": ["Summary", "NER"][at % 3 == 0], "input": review[: 20 + at], "target": review[-(5 + at % 40) :]}
        for at, review in enumerate(reviews[:90])
    ]
    return [str(write_rows(tmp_path / "a.jsonl", rows[:50])), str(write_rows(tmp_path / "b.jsonl", rows[50:]))]


def read_rows(files):
    return [json.loads(line) for name in files for line in Path(name).read_text("utf-8").splitlines()]


def tokens(tokenizer, row):
    """Lengths of the prompt `<s>` input `</s></s>` and of the target with its `</s>`."""
    return [
        len(tokenizer(row[name], add_special_tokens=False)["input_ids"]) + controls
        for name, controls in (("input", 3), ("target", 1))
    ]


@pytest.mark.parametrize("max_length", [40, 70])
def test_counts_are_those_of_a_loop(files, tmp_path, tokenizer, tiny_folder, max_length, capsys):
    stats(files, str(tiny_folder), str(tmp_path / "out"), max_length=max_length)
    report = json.loads((tmp_path / "out" / "stats.json").read_text("utf-8"))
    assert list(report["kinds"]) == ["all", "Summary", "NER"]
    for kind, of in report["kinds"].items():
        lengths = [tokens(tokenizer, row) for row in read_rows(files) if kind in ("all", row["kind"])]
        whole = np.array([sum(pair) for pair in lengths])
        lost = [pair for pair in lengths if pair[0] >= max_length]
        assert of["rows"] == len(lengths)
        assert of["share"] == pytest.approx(len(lengths) / 90)
        assert of["tokens"] == whole.sum()
        assert of["target_tokens"] == sum(target for _, target in lengths)
        assert (of["mean"], of["longest"]) == (pytest.approx(whole.mean()), whole.max())
        assert [of["p50"], of["p90"], of["p99"]] == pytest.approx(np.quantile(whole, [0.5, 0.9, 0.99]).tolist())
        assert of["beyond"] == pytest.approx(np.mean(whole > max_length))
        assert of["truncated"] == np.count_nonzero(whole > max_length)
        assert of["no_target"] == len(lost)
        assert of["truncated_tokens"] == sum(np.maximum(whole - max_length, 0)) + max_length * len(lost)
    whole = [sum(tokens(tokenizer, row)) for row in read_rows(files)]
    width, bars = report["histogram"]["tokens_a_bar"], report["histogram"]["rows"]
    assert bars == [sum(at * width <= length < (at + 1) * width for length in whole) for at in range(len(bars))]
    assert f"over {max_length}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tasks.png", "lengths.png", "stats.json"}


def test_padding_is_that_of_micro_batches(files, tmp_path, tokenizer, tiny_folder):
    """Rows one by one need no padding; all together are padded to the longest."""
    whole = [sum(tokens(tokenizer, row)) for row in read_rows(files)]
    shares = {}
    for micro_batch_size, batch_size in ((1, 90), (90, 90), (10, 90)):
        out = tmp_path / str(micro_batch_size)
        stats(files, str(tiny_folder), str(out), 9999, batch_size=batch_size, micro_batch_size=micro_batch_size)
        shares[micro_batch_size] = json.loads((out / "stats.json").read_text("utf-8"))["kinds"]["all"]["padding"]
    assert shares[1] == 0
    assert shares[90] == pytest.approx(1 - sum(whole) / (90 * max(whole)))
    ordered = sorted(whole)
    padded = sum(10 * max(ordered[at : at + 10]) for at in range(0, 90, 10))
    assert shares[10] == pytest.approx(1 - sum(whole) / padded)


def test_mistakes_leave_no_folder(files, tmp_path, tiny_folder):
    for arguments, message in (
        ({"font": files[0]}, "not a font file that can be read"),
        ({"max_length": 0}, "--max_length and --batch_size must be at least 1"),
        ({"out": str(tmp_path)}, "is not empty"),
        ({"micro_batch_size": 0}, "data.micro_batch_size is 0; it must be at least 1"),
        ({"files": ["missing.jsonl"]}, "no such file"),
        ({"prompt": "x"}, "no format is called 'x'"),
    ):
        with pytest.raises(FireflyError, match=message):
            stats(**{"files": files, "tokenizer": str(tiny_folder), "out": str(tmp_path / "out"), **arguments})
        assert not (tmp_path / "out").exists()


def counted(folder):
    return json.loads((folder / "stats.json").read_text("utf-8"))


def test_without_a_font_for_the_kinds_everything_is_written_and_a_line_says_so(
    tmp_path, tiny_folder, monkeypatch, capsys
):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    rows = write_rows(tmp_path / "c.jsonl", [{"kind": "对联", "input": "问", "target": "答"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning for each character that is missing would bury the line
        stats([str(rows)], str(tiny_folder), str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tasks.png", "lengths.png", "stats.json"}
    assert counted(tmp_path / "out")["kinds"]["对联"]["rows"] == 1
    assert "tasks.png: names of kinds are not readable: no installed font has 对 联" in capsys.readouterr().err


def test_rows_that_training_refuses_are_counted_and_the_others_described(tmp_path, tiny_folder, capsys):
    good = {"kind": "[/x]", "input": "问", "target": "答", "note": "说明"}
    bad = [{**good, "target": " "}, {**good, "target": 5}, {**good, "kind": None}, {"question": "问"}]
    rows = write_rows(tmp_path / "rows.jsonl", [good, *bad, good])
    stats([str(rows)], str(tiny_folder), str(tmp_path / "out"))
    report = counted(tmp_path / "out")
    assert report["kinds"]["all"]["rows"] == 2
    assert report["refused"] == {"empty": 1, "not text": 2, "no form": 1}
    assert report["unused"] == {"note": 2}
    said = capsys.readouterr().out
    refused = "rows that training refuses: 1 (empty), 1 (no form), 2 (not text)"
    assert f"{rows}: {refused}; firefly clean leaves out all but those in no form" in said
    assert f"{rows}: nothing is learned of the text in these fields, here with their rows: note (2)" in said
    assert "[/x]" in said
    with pytest.raises(FireflyError, match=r"no row can be learned: .*1 \(empty\)"):
        stats([str(write_rows(tmp_path / "bad.jsonl", bad[:1]))], str(tiny_folder), str(tmp_path / "none"))
    raw = write_rows(tmp_path / "raw.jsonl", [{"text": "问", "label": "答"}])
    with pytest.raises(
        FireflyError, match=r"raw\.jsonl:1: the row is no document, since there is text beside 'text', in label"
    ):
        stats([str(raw)], str(tiny_folder), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_documents_are_counted_with_their_windows(tmp_path, tiny_folder, tokenizer, capsys):
    texts = ["春风又绿江南岸" * 20, "明月何时照我还"]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in texts]
    rows = [{"text": text} for text in texts] + [{"kind": "K", "input": "问", "target": "答"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    stats([str(source)], str(tiny_folder), str(tmp_path / "out"), max_length=16, stride=4)
    of = counted(tmp_path / "out")["kinds"]
    windows = [1 + max(0, -(-(length - 16) // 12)) for length in lengths]
    assert (of["Text"]["rows"], of["Text"]["tokens"], of["Text"]["windows"]) == (2, sum(lengths), sum(windows))
    assert (of["Text"]["truncated"], of["Text"]["truncated_tokens"], of["K"]["windows"]) == (0, 0, 0)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:1] == ["kind"] and "windows" in line for line in lines)


def test_a_kind_of_which_nothing_is_kept_has_no_mean(tmp_path, tiny_folder, capsys):
    taught = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    untaught = [taught[0], {**taught[1], "weight": 0}]
    long = {"kind": "Long", "input": "问" * 90, "target": "答"}
    rows = [{"messages": taught, "kind": "all"}, {"kind": "None", "messages": untaught}, long]
    stats([str(write_rows(tmp_path / "rows.jsonl", rows))], str(tiny_folder), str(tmp_path / "out"), max_length=20)
    kinds = counted(tmp_path / "out")["kinds"]
    assert [kinds["None"][name] for name in ("rows", "no_target", "mean", "p50", "longest", "padding")] == [
        0, 1, None, None, None, None
    ]  # fmt: skip
    assert (kinds["Long"]["padding"], kinds["Long"]["rows"]) == (None, 1)
    assert (kinds["all"]["rows"], kinds["all (a kind)"]["rows"]) == (2, 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Long", "–"] in [[line[0], line[-1]] for line in lines if line]
    assert ["None", "–"] in [[line[0], line[-1]] for line in lines if line]


def test_only_last_answers_are_counted_as_learned(files, tmp_path, tiny_folder, tokenizer):
    row = {"kind": "K", "input": "一", "target": "春风</s>二</s>明月何时"}
    rows = str(write_rows(tmp_path / "rows.jsonl", [row]))
    learned = {}
    for learn in ("all", "last"):
        stats([rows], str(tiny_folder), str(tmp_path / learn), learn=learn)
        learned[learn] = counted(tmp_path / learn)["kinds"]["K"]["target_tokens"]
    last = len(tokenizer("明月何时", add_special_tokens=False)["input_ids"]) + 1
    first = len(tokenizer("春风", add_special_tokens=False)["input_ids"]) + 1
    assert learned == {"all": first + last, "last": last}


def test_a_pair_counts_as_its_two_rows(tmp_path, tokenizer, tiny_folder, capsys):
    pairs = [{"prompt": f"问{at}" * 9, "chosen": "好" * (1 + at), "rejected": "坏" * (2 + at)} for at in range(5)]
    bad = {"prompt": "问", "chosen": "好", "rejected": "好"}
    file = write_rows(tmp_path / "pairs.jsonl", [*pairs, bad, {"kind": "QA", "input": "问", "target": "答"}])
    stats([str(file)], str(tiny_folder), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "stats.json").read_text("utf-8"))
    lengths = [
        tokens(tokenizer, {"input": pair["prompt"], "target": pair[name]})
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    assert found["kinds"]["Preference"]["rows"] == 10
    assert found["kinds"]["Preference"]["tokens"] == sum(map(sum, lengths))
    assert found["kinds"]["Preference"]["target_tokens"] == sum(target for _, target in lengths)
    assert found["kinds"]["QA"]["rows"] == 1
    assert found["refused"] == {"equal": 1}
    assert "1 (equal)" in capsys.readouterr().out
