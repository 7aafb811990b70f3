import errno
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.raw_rows import write_raw_rows
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.resumable import ResumableFile
from firefly_lightning.preparation import build as build_module
from firefly_lightning.preparation.build import build
from firefly_lightning.prompt import PromptEncoder, prompt_format
from tests.support.helpers import raised_line

POSITIVE = {"text": "很好用，下次还买。", "label": "positive"}
NEGATIVE = {"text": "太差了，再也不买。", "label": "negative"}


def raw_file(folder, rows, name="raw.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_real_rows_become_rows_that_can_be_trained_on(tmp_path):
    files = write_raw_rows(tmp_path / "raw", limit=300)
    files.pop("Text")  # texts are trained on as they are
    for kind, source in files.items():
        out = tmp_path / "built" / f"{kind}.jsonl"
        build(kind, [str(source)], str(out), per_row=2)
        rows, raw = read(out), read(source)
        assert len(rows) == 2 * len(raw) == 600
        for number, row in enumerate(rows):
            assert set(row) == {"kind", "input", "target"}
            shown = row["input"] + row["target"]
            assert (raw[number // 2].get("text") or raw[number // 2]["word"]) in shown
        parsed = list(read_rows(str(out)))
        assert [(row.kind, row.turns) for row in parsed] == [(kind, ((row["input"], row["target"]),)) for row in rows]


def test_a_row_gets_the_same_templates_wherever_it_lies(tmp_path):
    rows = [POSITIVE, NEGATIVE, POSITIVE, NEGATIVE]
    whole = raw_file(tmp_path, rows)
    parts = [raw_file(tmp_path, rows[:1], "1.jsonl"), raw_file(tmp_path, rows[1:], "2.jsonl")]
    build("SentimentAnalyze", [whole], str(tmp_path / "a"), seed=5)
    build("SentimentAnalyze", parts, str(tmp_path / "b"), seed=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    build("SentimentAnalyze", [str(tmp_path / "[12].jsonl")], str(tmp_path / "c"), seed=6)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_lost_rows_are_counted_and_shown(tmp_path, capsys):
    row = {"word": "甲", "explanation": "乙</s>丙"}
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "Word.yaml").write_text(
        "kind: Word\ndescription: d\nfields: {word: w, explanation: e}\n"
        "groups: [{inputs: ['{word}？'], targets: ['{explanation}']}]\n"
        "example: {row: {word: a, explanation: b}, input: a？, target: b}\n", "utf-8"
    )  # fmt: skip
    source = raw_file(tmp_path, [row, {"word": "</s>{丁}", "explanation": "戊"}])
    build("Word", [source], str(tmp_path / "out.jsonl"), templates=str(folder))
    assert read(tmp_path / "out.jsonl") == [{"kind": "Word", "input": "</s>{丁}？", "target": "戊"}]
    assert "1 Word rows from 2 raw rows, lost 1 (turn separator in text)" in capsys.readouterr().out
    with pytest.raises(FireflyError, match=r"nothing to write: 1 raw rows, lost 1 \(turn separator in text\)"):
        build("Word", [raw_file(tmp_path, [row])], str(tmp_path / "out.jsonl"), templates=str(folder))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([POSITIVE, {"text": "没有标签"}], "raw.jsonl:2: SentimentAnalyze needs the field label"),
        ([POSITIVE, {"text": "x", "label": ""}], "raw.jsonl:2: no template serves .*label is empty"),
        ([POSITIVE, [1]], "raw.jsonl:2: a row must be a JSON object"),
        ([], "nothing to write"),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, rows, message):
    source, out = raw_file(tmp_path, rows), tmp_path / "built" / "out.jsonl"
    out.parent.mkdir()
    out.write_text("old")
    with pytest.raises(FireflyError, match=message):
        build("SentimentAnalyze", [source], str(out))
    assert out.read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_success_replaces_the_old_file(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    build("SentimentAnalyze", [raw_file(tmp_path, [POSITIVE])], str(out))
    assert len(read(out)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "raw.jsonl"]


def test_wrong_arguments(tmp_path):
    source = raw_file(tmp_path, [POSITIVE])
    for out, arguments, message in (
        (source, {}, "is also an input"),
        (str(tmp_path), {}, "is a folder"),
        (source + "/x.jsonl", {}, "raw.jsonl"),
        (str(tmp_path / "out"), {"per_row": 0}, "--per_row 0"),
        (str(tmp_path / "out"), {"templates": str(tmp_path)}, "there are templates for none"),
        (str(tmp_path / "out"), {"templates": str(tmp_path / "no")}, "no: no such folder; --templates is a folder"),
    ):
        with pytest.raises(FireflyError, match=message):
            build("SentimentAnalyze", [source], out, **arguments)
    assert len(read(tmp_path / "raw.jsonl")) == 1


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = raw_file(tmp_path, [POSITIVE])
    monkeypatch.setattr(ResumableFile, "append", full)
    with pytest.raises(FireflyError, match=r"out\.jsonl: No space left on device; free some space"):
        build("SentimentAnalyze", [source], str(tmp_path / "out.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_columns_are_renamed_filled_in_and_chosen_by(tmp_path, capsys):
    rows = [
        {"q": " 1 + 1 是多少？\r\n", "a": "2", "set": "train"},
        {"q": "2 + 2 是多少？", "a": "4", "set": "test"},
    ]
    source, out = raw_file(tmp_path, rows), tmp_path / "out.jsonl"
    build("OpenQA", [source], str(out), rename=["q=question", "a=answer"], only=["set=train"], per_row="all")
    made = read(out)
    assert {row["target"] for row in made} == {"2"}
    assert len({row["input"] for row in made}) == len(made) == 8
    assert "1 + 1 是多少？" in {row["input"] for row in made}, "blanks and line ends around a text are none of it"
    assert "8 OpenQA rows from 2 raw rows, lost 1 (set is not train)" in capsys.readouterr().out
    task = raw_file(tmp_path, [{"task": "求和", "code": "sum(x)"}], "task.jsonl")
    build("Program", [task], str(out), constant=["language=Python"], per_row="all")
    assert any("Python" in row["input"] for row in read(out))


def test_tables_and_arrays_give_the_rows_of_json_lines(tmp_path):
    rows = [{"first": f"上{number}", "second": f"下,{number}"} for number in range(30)]
    build("Couplet", [raw_file(tmp_path, rows)], str(tmp_path / "expected"))
    (tmp_path / "raw.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "raw.csv").write_text(
        "first,second\n" + "".join(f'{a},"{b}"\n' for a, b in map(dict.values, rows)), "utf-8"
    )
    (tmp_path / "raw.tsv").write_text(
        "first\tsecond\n" + "".join(f"{a}\t{b}\n" for a, b in map(dict.values, rows)), "utf-8"
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw.parquet")
    for suffix in ("json", "csv", "tsv", "parquet"):
        build("Couplet", [str(tmp_path / f"raw.{suffix}")], str(tmp_path / suffix))
        assert (tmp_path / suffix).read_bytes() == (tmp_path / "expected").read_bytes(), suffix


def test_any_number_of_processes_and_files_gives_the_same_bytes(tmp_path):
    rows = [{"first": f"上联{number}", "second": f"下联{number}"} for number in range(3500)]
    build("Couplet", [raw_file(tmp_path, rows)], str(tmp_path / "one"), workers=1, seed=7)
    for at in range(7):
        raw_file(tmp_path, rows[500 * at : 500 * (at + 1)], f"part-{at}.jsonl")
    build("Couplet", [str(tmp_path / "part-*.jsonl")], str(tmp_path / "many"), workers=3, seed=7)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, capsys):
    rows = [POSITIVE, {"text": "没有标签"}, {"text": "？", "label": "neutral"}, NEGATIVE]
    build("SentimentAnalyze", [raw_file(tmp_path, rows)], str(tmp_path / "out"), bad_rows="skip")
    assert len(read(tmp_path / "out")) == 2
    said = capsys.readouterr().out
    assert "2 SentimentAnalyze rows from 4 raw rows, lost 1 (SentimentAnalyze needs the field label" in said
    assert "1 (field 'label' holds 'neutral'" in said


def test_a_thousand_different_reasons_are_counted_under_few(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build_module, "ROWS_PER_CHUNK", 7)
    rows = [POSITIVE, *[{"text": "？"}] * 9, *({"text": "？", "label": f"x{at}"} for at in range(999))]
    build("SentimentAnalyze", [raw_file(tmp_path, rows)], str(tmp_path / "out"), bad_rows="skip", workers=1)
    said = capsys.readouterr().out
    counts = [int(count) for count in re.findall(r"(\d+) \(", said.split("lost ")[1])]
    assert sum(counts) == 1008
    assert len(counts) == 11
    assert "9 (SentimentAnalyze needs the field label" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"raw\.jsonl: OpenQA needs the field question, answer; its templates read question, answer.* has q, a;"),
        ({"rename": ["q=question"]}, "OpenQA needs the field answer; .* the row has question, a; map names with --ren"),
        ({"rename": ["x=question"]}, r"--rename names x; the columns are q, a"),
        ({"rename": ["q=a"]}, "--rename and --constant would make a twice"),
        ({"rename": ["q"]}, "--rename q: must be NAME=TEXT"),
        ({"rename": ["q=b", "q=c"]}, "--rename q=c: q is there twice"),
        ({"constant": ["q=b"]}, "would make q twice"),
        ({"only": ["kind=b"]}, "--only names kind; the columns are q, a"),
        ({"workers": -1}, "--workers -1: must be at least 1"),
    ],
)
def test_columns_that_do_not_fit_are_told_before_anything_is_built(tmp_path, arguments, message):
    source = raw_file(tmp_path, [{"q": "问", "a": "答"}])
    with pytest.raises(FireflyError, match=message):
        build("OpenQA", [source], str(tmp_path / "out"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


MARKS = st.sampled_from(["</s>", "<s>", "<pad>", "{second}", "}}", "\\n", ""])
ODD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(ODD, MARKS, ODD, st.sampled_from(["<s>", "<pad>", "{first}", "<unk>", ""]))
def test_what_a_row_holds_never_becomes_a_control_token(tmp_path_factory, tokenizer, first, mark, second, other):
    """From a raw row to token ids: control tokens are those of the format, and masks mark the target and its end."""
    folder = tmp_path_factory.mktemp("odd")
    row = {"first": first + mark + first, "second": second + other + second}
    source, out = raw_file(folder, [row]), str(folder / "out")
    if any("</s>" in text for text in row.values()):  # one direction or the other has it in a target
        with pytest.raises(FireflyError, match="turn separator in text"):
            build("Couplet", [source], out, per_row="all")
        return
    build("Couplet", [source], out, per_row="all")
    encoder = PromptEncoder(tokenizer, prompt_format("firefly"))
    for made, parsed in zip(read(folder / "out"), read_rows(out), strict=True):
        (encoded,) = encoder.encode([parsed.turns])
        ids, mask = encoded.input_ids, encoded.target_mask
        assert len(ids) == len(mask)
        assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<pad>")] == [1, 3, 0]
        learned = [token for token, is_learned in zip(ids, mask, strict=True) if is_learned]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1], clean_up_tokenization_spaces=False) == made["target"]
        assert mask == sorted(mask), "what is learned is the end of the row"


def test_a_bad_row_that_stops_a_build_tells_how_to_go_on(tmp_path):
    for bad in ({"text": "？", "label": "neutral"}, {"text": "没有标签"}, {"text": ["列表"], "label": "positive"}):
        with pytest.raises(FireflyError, match=r"raw\.jsonl:2: .*counted with --bad_rows skip$") as raised:
            build("SentimentAnalyze", [raw_file(tmp_path, [POSITIVE, bad])], str(tmp_path / "out"), workers=1)
        raised_line(raised)
        build("SentimentAnalyze", [raw_file(tmp_path, [POSITIVE, bad])], str(tmp_path / "out"), bad_rows="skip")


def test_half_a_character_in_the_name_of_a_field_is_told(tmp_path, capsys):
    source = tmp_path / "raw.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (POSITIVE, {"text": "没有标签", "half\ud800": "x"})))
    build("SentimentAnalyze", [str(source)], str(tmp_path / "out"), bad_rows="skip", workers=1)
    assert r"half\ud800" in capsys.readouterr().out


def test_words_that_leave_rows_out_can_be_switched_off(tmp_path, capsys):
    rows = [
        {"question": question, "answer": "答案"}
        for question in ("文中提到了什么？", "感冒了应该吃什么？", "水的沸点是多少？")
    ]
    source, out = raw_file(tmp_path, rows), tmp_path / "out"
    build("OpenQA", [source], str(out), workers=1)
    assert len(read(out)) == 2
    assert "2 OpenQA rows from 3 raw rows, lost 1 (question holds 文中)" in capsys.readouterr().out
    build("OpenQA", [source], str(out), workers=1, unusable="keep")
    assert len(read(out)) == 3
