"""What is left out, why, and that nothing else is."""

import datetime
import decimal
import json
import re
import unicodedata
from itertools import combinations, pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rensa import RMinHash

from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.build import build
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.cleaning.duplicates import encoded, normalise, signatures
from firefly_lightning.preparation.cleaning.pieces import jaccard, piece_hashes, shingles
from tests.conftest import write_rows
from tests.support.helpers import raised_line

LONG = "西湖位于浙江省杭州市西部，是中国著名的淡水湖，湖中有苏堤、白堤和小瀛洲，四周群山环抱，风景秀丽，游人很多。"
OTHER = "武夷山在福建省北部，有九曲溪和三十六峰，历代文人多有题咏，山中出产岩茶，茶农依山开园，春天采茶的人往来不绝。"


def row(question, answer, kind="MRC"):
    return {"kind": kind, "input": question, "target": answer}


def cleaned(folder, rows, **arguments):
    """Kept rows, and the report."""
    source = write_rows(folder / "rows.jsonl", rows)
    out = folder / "out" / "clean.jsonl"
    clean([str(source)], str(out), **arguments)
    report = json.loads((out.parent / "clean.jsonl.report.json").read_text("utf-8"))
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()], report


def test_each_reason_is_counted_by_kind_with_an_example(tmp_path, capsys):
    good = [row(LONG + "西湖在哪里？", "杭州"), row("1+1=?", "2", "Cot"), row("说你好", "你好", "Cot")]
    bad = {
        "empty": row("问", " "),
        "broken characters": row("问\ufffd题", "答", "Cot"),
        "left-over markup": row("第一行<br>第二行", "答"),
        "target repeats input": row("请把这句话译成英文。", "请把这句话译成英文！"),
        "too long": row("长" * 400, "答", "Cot"),
        "too short": row("", "b"),
        "duplicate": row(LONG + " 西湖在哪里?", "杭州。"),
        "near duplicate": row(LONG + "西湖在哪儿？", "杭州"),
    }
    kept, report = cleaned(tmp_path, [*good, *bad.values()], min_characters=3, max_characters=399)
    assert kept == good
    assert report["counts"]["all"] == {"read": 11, "kept": 3, **dict.fromkeys(bad, 1)}
    assert report["counts"]["Cot"] == {"read": 4, "kept": 2, "broken characters": 1, "too long": 1}
    for at, (reason, left_out) in enumerate(bad.items(), 4):
        (example,) = report["examples"][left_out["kind"]][reason]
        assert example["where"] == f"{tmp_path / 'rows.jsonl'}:{at}"
        like = f"{tmp_path / 'rows.jsonl'}:1" if "duplicate" in reason else None
        assert example.get("like") == like
    table = capsys.readouterr().out
    for heading in ("read", "kept", *bad):
        assert all(word in table for word in heading.split())


def test_questions_about_one_passage_are_no_duplicates(tmp_path):
    rows = [
        row(f"{LONG}\n{question}", answer)
        for question, answer in (("湖在哪里？", "杭州市"), ("有什么堤？", "苏堤、白堤"))
    ]
    assert cleaned(tmp_path, rows)[0] == rows
    same_answer = [rows[0], row(f"{LONG}\n湖在哪？", "杭州市")]
    assert cleaned(tmp_path, same_answer)[0] == rows[:1]


def test_what_validation_rows_hold_is_left_out(tmp_path):
    val = write_rows(tmp_path / "val.jsonl", [row(LONG, "一段介绍西湖的文字"), {"instruction": "说好", "output": "好"}])
    rows = [
        row(LONG, "另一个回答"),  # the same question
        row(LONG[:-1] + "！", "一段介绍西湖的文字"),
        row("请看：" + LONG, "一段介绍西湖的文字"),  # nearly
        row("说好", "好的"),  # in another form
        row(OTHER, "一段介绍武夷山的文字"),
    ]
    kept, report = cleaned(tmp_path, rows, val_files=[str(val)])
    assert kept == rows[-1:]
    assert report["counts"]["MRC"] == {"read": 5, "kept": 1, "in the validation rows": 4}
    likes = [example["like"] for example in report["examples"]["MRC"]["in the validation rows"]]
    assert likes == [f"{val}:1", f"{val}:1", f"{val}:1", f"{val}:2"]


def test_rows_of_every_form_and_raw_rows_are_cleaned(tmp_path):
    talk = {"conversation": [{"human": "在吗", "assistant": "在"}, {"human": "好", "assistant": "嗯"}]}
    rows = [
        {"instruction": "翻译", "input": "hello", "output": "你好"},
        {"instruction": "翻译", "input": "hello", "output": ""},
        talk,
        {**talk, "kind": "Chat"},
        {"text": "林舟到了大理", "entities": [["林舟", "PER"]], "n": 3, "none": None},
        {"text": "林舟到了大理。", "entities": [["林舟", "PER"]], "n": 3},
    ]
    kept, report = cleaned(tmp_path, rows)
    assert kept == [rows[0], rows[2], rows[4]]
    assert {kind: counts.get("kept", 0) for kind, counts in report["counts"].items()} == {
        "all": 3, "Belle": 1, "Conversation": 1, "Chat": 0, "rows": 1,
    }  # fmt: skip


def test_pairs_are_cleaned_in_all_their_forms(tmp_path, capsys):
    """What training refuses is left out by name; the same pair in another form is a duplicate."""
    asked = {"role": "user", "content": LONG}
    said = [{"role": "assistant", "content": one} for one in ("在杭州。", "不知道。")]
    pair = {"input": LONG, "chosen": "在杭州。", "rejected": "不知道。"}
    good = [pair, {"kind": "Turned", "prompt": LONG, "chosen": "不知道。", "rejected": "在杭州。"}]
    bad = {
        "duplicate": {"chosen": [asked, said[0]], "rejected": [asked, said[1]]},
        "equal": {**pair, "rejected": pair["chosen"]},
        "empty": {**pair, "chosen": " "},
        "no form": {**pair, "chosen": None},
        "not text": {**pair, "rejected": 5},
        "no question": {**pair, "input": ""},
        "malformed": {"chosen": [said[0], asked], "rejected": [asked, said[1]]},
        "no answer": {"chosen": [asked], "rejected": [asked, said[1]]},
        "other prompts": {"chosen": [asked, said[0]], "rejected": [{**asked, "content": OTHER}, said[1]]},
        "broken characters": {**pair, "rejected": "第\ufffd一"},
    }
    kept, report = cleaned(tmp_path, [*good, *bad.values()], near_duplicates=1)
    assert kept == good
    assert report["counts"]["all"] == {"read": 12, "kept": 2, **dict.fromkeys(bad, 1)}
    assert report["counts"]["Turned"] == {"read": 1, "kept": 1}
    assert "no form that training reads" not in capsys.readouterr().out


def test_documents_are_cleaned_by_their_text(tmp_path):
    """No two of them ask the same, though none asks anything; a line of a text file becomes a row."""
    texts = [LONG, LONG[:-1] + "！", OTHER, "第\ufffd一", " "]
    rows = [{"text": text, "url": f"http://{at}"} for at, text in enumerate(texts)]
    kept, report = cleaned(tmp_path, rows)
    assert kept == [rows[0], rows[2]]
    assert report["counts"] == {
        kind: {"read": 5, "kept": 2, "near duplicate": 1, "broken characters": 1, "empty": 1}
        for kind in ("all", "Text")
    }
    val = write_rows(tmp_path / "val.jsonl", [{"text": OTHER}, row("", "没有问题的回答")])
    lines = tmp_path / "texts.txt"
    lines.write_text(f"{LONG}\n\n{OTHER}\n", "utf-8")
    clean([str(lines)], str(tmp_path / "clean.jsonl"), [str(val)])
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text("utf-8").splitlines()] == [{"text": LONG}]
    clean([str(lines)], str(tmp_path / "whole.jsonl"), document_per="file", near_duplicates=1)
    assert json.loads((tmp_path / "whole.jsonl").read_text("utf-8")) == {"text": f"{LONG}\n\n{OTHER}"}


def test_rows_without_a_question_do_not_ask_the_same(tmp_path):
    val = write_rows(tmp_path / "val.jsonl", [row("", LONG)])
    rows = [row("", OTHER), row("", LONG)]
    assert cleaned(tmp_path, rows, val_files=[str(val)])[0] == rows[:1]


def test_later_turns_inside_a_target_are_turns(tmp_path):
    talk = {"conversation": [{"human": "在吗", "assistant": "在"}, {"human": "好", "assistant": "嗯"}]}
    rows = [
        row("在吗", "在</s>好</s>嗯"),
        talk,  # the same
        row("春天来了", "花开了</s>请把这句话译成英文。</s>请把这句话译成英文！"),
        row("问一", "答一</s>问二</s> </s>问三</s>答三"),
        row("问一", "答一</s>问二"),  # a last question without an answer is not learned
    ]
    kept, report = cleaned(tmp_path, rows)
    assert kept == [rows[0], rows[4]]
    assert report["counts"]["all"] == {
        "read": 5, "kept": 2, "duplicate": 1, "target repeats input": 1, "empty": 1
    }  # fmt: skip
    assert [made.turns for made in read_rows(str(tmp_path / "out" / "clean.jsonl"))] == [
        (("在吗", "在"), ("好", "嗯")),
        (("问一", "答一"),),
    ]


def test_rows_that_training_would_refuse_are_left_out_and_counted(tmp_path):
    good = [{"instruction": "加一", "output": "好"}, {"instruction": "减一", "input": None, "output": "好的"}]
    bad = [
        {"instruction": 5, "input": "", "output": "五"},
        {"instruction": ["加法", "减法"], "input": "", "output": "五"},
        {"instruction": "加一", "input": 4.0, "output": "五"},
        {"instruction": "加一是几", "output": None},
        row("问", 5),
        row("问", "答", kind=None),
        {"conversation": [{"human": "在吗", "assistant": 1}]},
        {"conversation": "在吗"},
        {"conversation": [{"human": "在吗"}]},
        {"conversation": []},
    ]
    kept, report = cleaned(tmp_path, [*bad, *good])
    assert kept == good
    assert report["counts"]["all"] == {
        "read": 12, "kept": 2, "not text": 7, "malformed": 2, "empty": 1
    }  # fmt: skip
    assert len(list(read_rows(str(tmp_path / "out" / "clean.jsonl")))) == 2
    for at, one in enumerate(bad):
        with pytest.raises(FireflyError, match=rf"{at}.jsonl:1"):
            list(read_rows(str(write_rows(tmp_path / f"{at}.jsonl", [one]))))


def test_half_a_character_is_left_out_wherever_it_is(tmp_path):
    broken = [
        {"kind": "\ud800", "input": "问", "target": "答"},
        {"instruction": "问", "output": "答\ud800"},
        {"instruction": "说好", "output": "好", "note\ud800": ""},
        {"conversation": [{"human": "在吗", "assistant": "在", "note": "\ud800"}]},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in [*broken, row("问", "答")]))
    clean([str(source)], str(tmp_path / "clean.jsonl"))
    report = json.loads((tmp_path / "clean.jsonl.report.json").read_text("utf-8"))
    assert report["counts"]["all"] == {"read": 5, "kept": 1, "broken characters": 4}


def test_validation_rows_of_any_types_are_read(tmp_path):
    val = write_rows(tmp_path / "val.jsonl", [{"instruction": 5, "output": ["五"]}, row("一加一", "二")])
    rows = [row("一加一", "两"), row("二加二", "四")]
    assert cleaned(tmp_path, rows, val_files=[str(val)])[0] == rows[1:]


def test_code_keeps_what_looks_like_markup(tmp_path):
    rows = [row("写网页", "<p>&nbsp;</p>", "Program"), row("写网页吧", "<p>&nbsp;</p>", "OpenQA")]
    assert cleaned(tmp_path, rows)[0] == rows[:1]
    page = row("用网页写标题", "<div><p>标题</p></div>", "Belle")
    assert cleaned(tmp_path, [page])[0] == [page]


PIECES = st.lists(
    st.sampled_from(["春眠不觉晓，", "处处闻啼鸟。", "夜来风雨声，", "花落知多少。", "Ａ b", "😀", "+", "</s>{x}"]),
    max_size=6,
)


TEXT_ROWS = st.lists(st.builds(lambda *parts: row(*map("".join, parts)), PIECES, PIECES), min_size=1, max_size=12)


@settings(max_examples=30)
@given(TEXT_ROWS, st.sampled_from([0.5, 0.8, 1.0]))
def test_rows_are_left_out_only_for_a_reason_that_holds(tmp_path_factory, rows, threshold):
    first = row("一个谁也不会重复的问题", "和它的回答")
    kept, report = cleaned(tmp_path_factory.mktemp("clean"), [first, *rows], near_duplicates=threshold)

    def plain(text):
        return re.sub("[ ，。{}]", "", unicodedata.normalize("NFKC", text).casefold()) or text.strip()

    def grams(text):
        return {text[at : at + 5] for at in range(max(1, len(text) - 4))}

    def turns(one):
        said = [one["input"], *one["target"].split("</s>")]
        while len(said) > 2 and not said[-1].strip():
            said.pop()
        return [(said[at], said[at + 1]) for at in range(0, len(said) - 1, 2)]

    def whole(one):
        return "".join(plain(text) for turn in turns(one) for text in turn)

    def answers(one):
        return "".join(plain(answer) for _, answer in turns(one))

    def alike(one, two):
        same, similar = True, 1.0
        for of in (whole, answers):
            a, b = of(one), of(two)
            same &= a == b
            similar = min(similar, len(grams(a) & grams(b)) / len(grams(a) | grams(b)))
        return same or (threshold < 1 and similar >= threshold)

    def spoilt(one):
        pairs = [(plain(question), plain(answer)) for question, answer in turns(one)]
        empty = any(not answer.strip() for _, answer in turns(one))
        return empty or any(q == a or (len(q) >= 10 and a.startswith(q)) for q, a in pairs)

    remaining = iter([first, *rows])
    assert all(any(one == other for other in remaining) for one in kept), "kept rows are as they were, in their order"
    assert sum(report["counts"]["all"].values()) == 2 * len([first, *rows])
    for one in rows:
        assert one in kept or spoilt(one) or any(alike(one, other) for other in kept)
    for one, two in combinations(kept, 2):
        assert not (whole(one) == whole(two) and alike(one, two))


@pytest.mark.parametrize(("share", "found"), [(0.02, True), (0.6, False)])
def test_near_duplicates_of_real_text_are_found(tmp_path, reviews, share, found):
    """Each review beside itself with characters left out: few make a near duplicate, many do not."""
    reviews = [review for review in reviews if len(review) > 150][:40]
    assert len(reviews) == 40
    rows = []
    for review in reviews:
        step = round(1 / share)
        changed = "".join(character for at, character in enumerate(review) if at % step)
        rows += [row(review, "好评"), row(changed, "好评")]
    report = cleaned(tmp_path, rows)[1]
    near = report["counts"]["all"].get("near duplicate", 0)
    assert near >= 36 if found else near == 0


def test_similarity_is_that_of_jaccard():
    assert shingles(b"abcdefg") == {b"abcde", b"bcdef", b"cdefg"}
    assert shingles("春a眠😀不b".encode()) == {"春a眠😀不".encode(), "a眠😀不b".encode()}
    assert shingles("春眠不觉".encode()) == {"春眠不觉".encode()}
    assert jaccard({b"a", b"b", b"c"}, {b"b", b"c", b"d"}) == 0.5
    assert normalise("Ａ，b 　C!") == "abc"
    assert normalise("！？") == "！？"
    one, other = signatures(piece_hashes([encoded(normalise(text)) for text in ("一二三四五六", "一二三，四五六！")]))
    assert (one == other).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("8-2", "8+2"), ("8-2", "8*2"), ("8-2", "82"), ("8/2", "82"), ("-5", "5"), ("－5", "5"), (".5", "5")],
        *[("1.5", "15"), ("１．５", "15"), ("1,2", "12"), ("1 2", "12"), ("1\n2", "12"), ("5%", "5"), ("５％", "5")],
        *[("C#", "C++"), ("C#", "C"), ("a*b", "a/b"), ("a<b", "a>b"), ("x-1", "x1"), ("√2", "2"), ("5°", "5")],
        *[("की", "के"), ("ไม่", "ไม้"), ("か", "が"), ("é", "e"), ("👍", "👎"), ("→", "←"), ("￥5", "$5")],
    ],
)
def test_signs_of_numbers_names_and_words_make_a_difference(tmp_path, one, other):
    kept, _ = cleaned(tmp_path, [row(one, "答"), row(other, "答"), row(one, other)])
    assert kept == [row(one, "答"), row(other, "答"), row(one, other)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("Ａ，b 　C!", "abc"), ("好～", "好"), ("“好”……", "好"), ("（好）", "好"), ("a_b", "ab"), ("`ab`", "ab")],
        *[("1，2", "1, 2"), ("5 - 3", "5-3"), ("Ｃ＃", "c#"), ("价：5", "价5"), ("- 5", "5"), ("ﬁ", "FI")],
        *[("é", "e\u0301"), ("ｶﾞ", "ガ"), ("❤\ufe0f", "❤"), ("1\xad2", "12"), ("ab\u2060c", "abc")],
    ],
)
def test_blanks_punctuation_width_and_case_make_no_difference(tmp_path, one, other):
    kept, report = cleaned(tmp_path, [row(one, "答"), row(other, "答"), row(one, other)])
    assert kept == [row(one, "答")]
    assert report["counts"]["all"] == {"read": 3, "kept": 1, "duplicate": 1, "target repeats input": 1}


def test_a_long_run_of_punctuation_takes_no_longer_by_character():
    text = "-" * 1_000_000
    assert normalise(f"a{text}5") == "a-5"
    assert normalise(f"5{text}a") == "5a"


@given(st.lists(st.text(st.sampled_from("aé春😀\ud800\0"), max_size=12) | st.text(max_size=40), min_size=1, max_size=9))
def test_pieces_of_many_texts_are_hashed_at_once_as_rensa_hashes_them(texts):
    written = [encoded(text) for text in texts]
    found = piece_hashes(written)
    expected = RMinHash.hash_token_sets([sorted(shingles(text)) for text in written])
    parts = [found.hashes[start:end].tolist() for start, end in pairwise(found.ends.tolist())]
    assert [sorted(set(part)) for part in parts] == [sorted(part) for part in expected]
    assert found.distinct().tolist() == [len(shingles(text)) for text in written]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([row("问", "")], {}, r"nothing is left of 1 rows: 1 \(empty\)"),
        ([], {}, r"rows\.jsonl: has no rows; fill it or remove it from the list"),
        ([row("问", "答")], {"near_duplicates": 0.0}, "--near_duplicates 0.0: must be above 0"),
        ([row("问", "答")], {"min_characters": 9, "max_characters": 8}, "--max_characters 8: must be at least --min"),
        ([row("问", "答")], {"val_files": ["missing.jsonl"]}, "missing.jsonl: no such file"),
        ([row("问", "答"), [1]], {}, r"rows.jsonl:2: a row must be a JSON object"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, rows, arguments, message):
    with pytest.raises(FireflyError, match=message) as raised:
        cleaned(tmp_path, rows, **arguments)
    raised_line(raised)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.jsonl"]


def test_a_source_is_not_overwritten(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [row("问", "答")])
    with pytest.raises(FireflyError, match="is also an input"):
        clean([str(source)], str(source))


def test_columns_of_a_table_that_json_cannot_hold_are_written_as_text_or_named(tmp_path):
    when, price = datetime.datetime(2024, 2, 29, 12, 30), decimal.Decimal("1.50")
    rows = [{**row("问", "答"), "when": when, "price": price}, {**row("再问", "再答"), "when": None, "price": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    clean([str(tmp_path / "rows.parquet")], str(tmp_path / "clean.jsonl"))
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text("utf-8").splitlines()]
    assert [(one["when"], one["price"]) for one in kept] == [("2024-02-29 12:30:00", "1.50"), (None, None)]
    for name, value in (("image", b"\x89PNG"), ("images", [{"bytes": b"\x89PNG"}])):
        pq.write_table(pa.Table.from_pylist([{**row("问", "答"), name: value}]), tmp_path / "binary.parquet")
        message = rf"binary\.parquet:1: the field {name} holds bytes, which a line of JSON cannot; leave the column out"
        with pytest.raises(FireflyError, match=message) as raised:
            clean([str(tmp_path / "binary.parquet")], str(tmp_path / "none.jsonl"))
        raised_line(raised)
    assert not (tmp_path / "none.jsonl").exists()


def test_kinds_are_shown_as_they_are(tmp_path, capsys):
    rows = [
        row("有问", "有答", "all"),
        row("问", "答", "[/x]"),
        row("再问", "再答", "[bold]"),
        row("又问", "又答", ":smile:"),
        row("还问", "", "[/x]"),
    ]
    kept, report = cleaned(tmp_path, rows)
    assert len(kept) == 4
    assert report["counts"]["all"] == {"read": 5, "kept": 4, "empty": 1}
    assert report["counts"]["all (a kind)"] == {"read": 1, "kept": 1}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["[/x]", "2", "1", "1"] in lines
    assert {"[bold]", ":smile:"} <= {line[0] for line in lines if line}


def test_forms_of_today_are_cleaned_as_others_are(tmp_path):
    messages = [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在"}]
    shared = [{"from": "human", "value": "在吗"}, {"from": "gpt", "value": "在"}]
    rows = [
        {"messages": messages},
        {"conversations": shared},
        {"messages": messages, "system": "你是客服"},
        {"messages": messages[:1]},
        {"conversations": [*shared, {"from": "tool", "value": "x"}]},
        {"instruction": "在吗", "output": "在", "history": [["你好", "早上好"]]},
    ]
    kept, report = cleaned(tmp_path, rows)
    assert kept == [rows[0], rows[2], rows[5]]
    assert report["counts"]["all"] == {"read": 6, "kept": 3, "duplicate": 1, "empty": 1, "malformed": 1}
    assert len(list(read_rows(str(tmp_path / "out" / "clean.jsonl")))) == 3


@pytest.mark.parametrize(("per_row", "hinted"), [(2, True), (1, False)])
def test_rows_of_one_raw_row_are_hinted_at(tmp_path, reviews, capsys, per_row, hinted):
    raw = [{"abstract": text, "title": text[-20:]} for text in reviews if len(text) > 150][:30]
    built = tmp_path / "built.jsonl"
    build("Summary", [str(write_rows(tmp_path / "raw.jsonl", raw))], str(built), per_row=per_row, workers=1)
    capsys.readouterr()
    clean([str(built)], str(tmp_path / "clean.jsonl"))
    report = json.loads((tmp_path / "clean.jsonl.report.json").read_text("utf-8"))["counts"]["all"]
    said = capsys.readouterr().out
    near = report.get("near duplicate", 0)
    assert (near >= 10) == hinted
    hint = f"{near} of {30 * per_row} Summary rows nearly repeat the row before them, as rows do that firefly build"
    assert (hint in said) == hinted
    assert ("--near_duplicates 1" in said) == hinted


def test_rows_that_training_cannot_read_are_named(tmp_path, capsys):
    """Two columns of another name are no raw rows, however they look."""
    rows = [{"prompt": f"问题{index}", "completion": f"回答{index}"} for index in range(3)]
    good = {"kind": "NER", "input": "第一问", "target": "第一答"}
    clean([str(write_rows(tmp_path / "rows.jsonl", [*rows, good]))], str(tmp_path / "out.jsonl"))
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of the rows that were kept are in no form that training reads" in said
    assert "['completion', 'prompt']" in said
    clean([str(write_rows(tmp_path / "rows.jsonl", [good]))], str(tmp_path / "other.jsonl"))
    assert "in no form" not in capsys.readouterr().out
