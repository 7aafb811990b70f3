"""The forms that data sets have today, each with its system text, its earlier turns and its flags."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firefly_lightning.data.sources.any_record import read_leniently
from firefly_lightning.data.sources.row_forms import Row, RowReader, RowRules, read_rows
from firefly_lightning.errors import FireflyError
from tests.conftest import write_rows

ALPACA = {"instruction": "再见怎么说", "output": "再见！"}
HISTORY = [["你好怎么说", "你好！"], ["谢谢呢", "谢谢！"]]
SYSTEM = "你是翻译"


def said(*texts: str, names=("user", "assistant"), keys=("role", "content"), **more) -> list[dict]:
    return [{keys[0]: names[at % 2], keys[1]: text, **more} for at, text in enumerate(texts)]


def system(text: str = SYSTEM, keys=("role", "content")) -> dict:
    return {keys[0]: "system", keys[1]: text}


SHARE = {"names": ("human", "gpt"), "keys": ("from", "value")}
TWO = (("问一", "答一"), ("问二", "答二"))
LATER = (("你是翻译\n问一", "答一"), ("问二", "答二"))
TEXTS = ("问一", "答一", "问二", "答二")

FORMS = [
    ({"messages": said(*TEXTS)}, TWO),
    ({"messages": [system(), *said(*TEXTS)]}, LATER),
    ({"messages": [{"role": "developer", "content": SYSTEM}, *said(*TEXTS)]}, LATER),
    ({"messages": [system("你是"), system("翻译"), *said(*TEXTS)]}, (("你是\n翻译\n问一", "答一"), TWO[1])),
    ({"messages": [system(""), *said(*TEXTS)]}, TWO),
    ({"messages": said("问一", "答一"), "system": SYSTEM}, LATER[:1]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}, {"type": "text", "text": "一"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "答一"}]}]}, TWO[:1]),
    ({"conversations": said(*TEXTS, **SHARE)}, TWO),
    ({"conversations": [system(keys=("from", "value")), *said(*TEXTS, **SHARE)]}, LATER),
    ({"conversations": said(*TEXTS, names=("user", "chatgpt"), keys=("from", "value")), "system": SYSTEM}, LATER),
    ({"conversations": said(*TEXTS)}, TWO),  # as ChatGLM has them
    ({"messages": said(*TEXTS, **SHARE)}, TWO),
    ({"conversation": [{"human": "问一", "assistant": "答一"}, {"human": "问二", "assistant": "答二"}]}, TWO),
    ({"conversation": [{"human": "问一", "assistant": "答一"}], "system": SYSTEM}, LATER[:1]),
    (ALPACA, (("再见怎么说", "再见！"),)),
    ({**ALPACA, "input": "客气地"}, (("再见怎么说\n客气地", "再见！"),)),
    ({**ALPACA, "system": SYSTEM, "input": ""}, (("你是翻译\n再见怎么说", "再见！"),)),
    ({**ALPACA, "history": HISTORY}, (*map(tuple, HISTORY), ("再见怎么说", "再见！"))),
    ({**ALPACA, "history": HISTORY, "system": SYSTEM},
     (("你是翻译\n你好怎么说", "你好！"), ("谢谢呢", "谢谢！"), ("再见怎么说", "再见！"))),
    ({**ALPACA, "history": [], "system": None}, (("再见怎么说", "再见！"),)),
    ({**ALPACA, "history": "", "system": ""}, (("再见怎么说", "再见！"),)),  # as a table has them
    ({"kind": "K", "input": "问三", "target": "答三</s>问四</s>答四", "history": [["问一", "答一"]], "system": SYSTEM},
     (("你是翻译\n问一", "答一"), ("问三", "答三"), ("问四", "答四"))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), FORMS)
def test_every_form_is_read_strictly_and_leniently(tmp_path, row, turns):
    file = write_rows(tmp_path / "rows.jsonl", [row, {**row, "kind": "Own"}])
    reader = RowReader(str(file))
    first, own = reader
    assert first.turns == own.turns == turns
    assert (first.unanswered, first.learned, own.kind) == (False, (), "Own")
    assert not reader.unused
    assert read_leniently(row)[1:] == (turns, [], None, False)
    assert read_leniently(row).kind == first.kind


def test_tables_have_the_columns_of_every_form(tmp_path):
    rows = [row for row, _ in FORMS if "content" not in json.dumps(row) or "type" not in json.dumps(row)]
    rows = [row for row in rows if not isinstance(row.get("history"), str)]
    item = pa.struct([(name, pa.string()) for name in ("role", "content", "from", "value", "human", "assistant")])
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("kind", "input", "target", "instruction", "output", "system")),
            ("history", pa.list_(pa.list_(pa.string()))),
            *((name, pa.list_(item)) for name in ("conversation", "conversations", "messages")),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "rows.parquet")
    expected = [turns for row, turns in FORMS if row in rows]
    assert len(expected) > 15
    assert [row.turns for row in read_rows(str(tmp_path / "rows.parquet"))] == expected


@pytest.mark.parametrize(
    ("flags", "learned"),
    [
        ([{"weight": 0}, {}], (False, True)),
        ([{"weight": 1.0}, {"weight": 0}], (True, False)),
        ([{"train": False}, {"train": True}], (False, True)),
        ([{"loss": False}, {"loss": None}], (False, True)),
        ([{"weight": 0}, {"weight": 0}], (False, False)),
        ([{"weight": 1}, {}], ()),
    ],
)
def test_a_turn_says_whether_it_is_learned(tmp_path, flags, learned):
    pairs = [{"human": "问", "assistant": "答", **flag} for flag in flags]
    messages = [one for flag in flags for one in (*said("问"), {"role": "assistant", "content": "答", **flag})]
    shared = [one for flag in flags for one in (*said("问", **SHARE), {"from": "gpt", "value": "答", **flag})]
    rows = [{"conversation": pairs}, {"messages": messages}, {"conversations": shared}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert [row.learned for row in read_rows(str(file))] == [learned] * 3
    assert [row.turns for row in read_rows(str(file))] == [(("问", "答"),) * 2] * 3
    last = [row.learned for row in RowReader(str(file), RowRules(learn="last"))]
    assert last == [(False, learned[-1] if learned else True)] * 3


def test_only_the_last_target_is_learned_in_every_form(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [row for row, _ in FORMS])
    for row, (_, turns) in zip(RowReader(str(file), RowRules(learn="last")), FORMS, strict=True):
        assert row.learned == (() if len(turns) == 1 else (*[False] * (len(turns) - 1), True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [*said("问", "答"), system()]}, "1, turn 3: a system text must come before the first question"),
        ({"messages": said("问", "答")[1:]}, "1, turn 1: an answer must follow a question"),
        ({"messages": [*said("问"), *said("问", "答")]}, "1, turn 2: two questions follow one another"),
        ({"messages": said("问")}, "1: no turn has an answer, so there is nothing to learn"),
        ({"messages": [system()]}, "1: no turn has an answer"),
        ({"messages": []}, "1: 'messages' must be a list of at least one"),
        ({"messages": "在吗"}, "1: 'messages' must be a list of at least one"),
        ({"messages": [{}]}, "1: turn 1 of 'messages' must be an object with human and assistant, role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "1, turn 1: 'tool' is none of the known roles system,"),
        ({"messages": [{"role": 5, "content": "x"}]}, "1, turn 1: field 'role' must be a string, this is int"),
        ({"messages": [{"role": "user"}]}, "1, turn 1: field 'content' is missing"),
        ({"messages": [*said("问"), {"role": "assistant", "content": None, "tool_calls": ["x"]}]},
         "1, turn 2: field 'content' must be a string, this is NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
         "1, turn 1: part 1 of 'content' is no {type: text, text}"),
        ({"messages": [*said("问"), {"role": "assistant", "content": "答", "weight": 0.5}]},
         "1, turn 2: 'weight' is 0.5, and only 0 and 1"),
        ({"messages": [*said("问"), {"role": "assistant", "content": "答", "weight": "1"}]}, "'weight' is str, and"),
        ({"messages": [*said("问"), {"role": "assistant", "content": "答", "weight": 0, "train": True}]}, "disagree"),
        ({"messages": [*said("问", weight=1), *said("问", "答")[1:]]}, "1, turn 1: 'weight' asks to learn what is no"),
        ({"conversations": [{"from": "gpt", "value": "答"}]}, "1, turn 1: an answer must follow a question"),
        ({**ALPACA, "history": "你好"}, r"1: 'history' must be a list of \[question, answer\], this is str"),
        ({**ALPACA, "history": [["你好"]]}, "1: turn 1 of 'history' must be"),
        ({**ALPACA, "history": [["你好", 5]]}, "1, turn 1 of 'history': field 'answer' must be a string, this is int"),
        ({**ALPACA, "history": [["你好", " "]]}, "1: the target of turn 1 is empty"),
        ({**ALPACA, "system": ["你好"]}, "1: field 'system' must be a string, this is list"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_conversation_is_told(tmp_path, row, message):
    file = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(FireflyError, match=rf"rows\.jsonl:{message}" if message[0] == "1" else message):
        list(read_rows(str(file)))
    assert read_leniently(row).fault or "empty" in message
    reader = RowReader(str(file), RowRules(counting_faults=True))
    assert list(reader) == []
    assert sum(reader.faults.values()) == 1


def test_a_last_question_without_an_answer_is_left_out_and_counted(tmp_path):
    rows = [
        {"messages": said("问一", "答一", "问二")},
        {"conversations": said("问一", "答一", "问二", **SHARE)},
        {"kind": "K", "input": "问一", "target": "答一</s>问二"},
    ]
    read = list(read_rows(str(write_rows(tmp_path / "rows.jsonl", rows))))
    assert [(row.turns, row.unanswered) for row in read] == [(TWO[:1], True)] * 3


def test_text_that_no_form_reads_is_counted_by_its_field(tmp_path):
    rows = [
        {**ALPACA, "note": "一个说明", "id": 5, "score": 0.5, "empty": " "},
        {**ALPACA, "note": {"why": ["因为"]}, "tags": [1, None, []]},
        {"kind": "K", "input": "问", "target": "答", "conversation": [{"human": "另一个问题"}]},
        {"messages": said("问", "答", name="小明", reasoning_content="想"), "tools": [{"name": "search"}]},
        {"conversation": [{"human": "问", "assistant": "答", "note": "x"}, {"human": "问", "assistant": "答"}]},
        {**ALPACA, "kind": ["Chat"], "half\ud800": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = RowReader(str(tmp_path / "rows.jsonl"))
    assert len(list(reader)) == 6
    assert dict(reader.unused) == {
        "note": 2, "conversation": 1, "messages.name": 1, "messages.reasoning_content": 1, "tools": 1,
        "conversation.note": 1, "kind": 1, r"half\ud800": 1,
    }  # fmt: skip
    assert len(list(reader)) == 6
    assert reader.unused["note"] == 2, "counted anew"


def test_rows_to_be_answered_need_no_target(tmp_path):
    kind, rows = "K", []
    rows += [({"kind": "K", "input": "问", **more}, kind) for more in ({}, {"target": ""}, {"target": None})]
    rows += [({"input": "问"}, "Firefly"), ({"instruction": "问"}, "Belle")]
    rows += [({"instruction": "问", "input": "", "output": None, "kind": "K"}, kind)]
    rows += [({"messages": said("问")}, "Conversation"), ({"conversations": said("问", **SHARE)}, "Conversation")]
    rows += [({"conversation": [{"human": "问"}]}, "Conversation")]
    rows += [({"conversation": [{"human": "问", "assistant": None}]}, "Conversation")]
    file = write_rows(tmp_path / "rows.jsonl", [row for row, _ in rows])
    expected = [Row(kind, (("问", ""),), at) for at, (_, kind) in enumerate(rows, 1)]
    assert list(RowReader(str(file), RowRules(answering=True))) == expected
    with pytest.raises(FireflyError, match="none of the accepted forms"):
        list(RowReader(str(write_rows(tmp_path / "other.jsonl", [{"question": "问"}])), RowRules(answering=True)))


def test_of_a_conversation_to_be_answered_the_open_question_is_asked(tmp_path):
    rows = [
        {"messages": [system(), *said("问一", "答一", "问二")]},
        {"kind": "K", "input": "问一", "target": "答一</s>问二", "system": SYSTEM},
        {**ALPACA, "output": "", "instruction": "问二", "history": [["问一", "答一"]], "system": SYSTEM},
        {"messages": [system(), *said("问一", "答一")]},
        {"messages": [system(), *said("问一", "答一", weight=0)]},
    ]
    read = list(RowReader(str(write_rows(tmp_path / "rows.jsonl", rows)), RowRules(answering=True)))
    assert [row.turns for row in read] == [(LATER[0], ("问二", ""))] * 3 + [LATER[:1]] * 2
    assert [row.learned for row in read] == [(False, True)] * 3 + [(), (True,)]
