"""Pairs are read in all their forms, and what is no pair is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning import FireflyError
from firefly_lightning.data.sources.pair_forms import KNOWN, row_to_answer, rows_of_pair
from firefly_lightning.data.sources.row_forms import RowReader, RowRules
from firefly_lightning.data.sources.row_texts import BadRowError
from tests.conftest import write_rows
from tests.support.fuzzed_rows import PROPER, VALUES
from tests.support.helpers import raised_line


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED = [message("user", "1+1=?"), message("assistant", "3"), message("user", "不对。")]
BETTER, WORSE = [message("assistant", "是 2。")], [message("assistant", "是 4。")]
TURNS = (("1+1=?", "3"), ("不对。", "是 2。")), (("1+1=?", "3"), ("不对。", "是 4。"))

SAME = {
    "ours": {"history": [["1+1=?", "3"]], "input": "不对。", "chosen": "是 2。", "rejected": "是 4。"},
    "TRL's texts": {"history": [["1+1=?", "3"]], "prompt": "不对。", "chosen": "是 2。", "rejected": "是 4。"},
    "TRL's messages": {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
    "TRL's conversations": {"chosen": [*ASKED, *BETTER], "rejected": [*ASKED, *WORSE]},
    "texts after messages": {"prompt": ASKED, "chosen": "是 2。", "rejected": "是 4。"},
    "a prompt beside conversations": {
        "prompt": "不对。", "chosen": [*ASKED, *BETTER], "rejected": [*ASKED, *WORSE],
    },
    "an instruction": {
        "instruction": "不对。", "input": "", "history": [["1+1=?", "3"]], "chosen": "是 2。", "rejected": "是 4。",
    },
    "a closing </s> written out": {
        "history": [["1+1=?", "3"]], "input": "不对。", "chosen": "是 2。</s>", "rejected": "是 4。</s>",
    },
    "a row of a table, with nulls": {
        "input": None, "prompt": ASKED, "chosen": BETTER, "rejected": WORSE, "system": None, "history": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_all_forms_say_the_same(form):
    rows, unused = rows_of_pair(SAME[form], 7)
    assert tuple(row.turns for row in rows) == TURNS
    assert [row.learned for row in rows] == [(False, True)] * 2
    assert {(row.kind, row.number, row.unanswered) for row in rows} == {("Preference", 7, False)}
    assert unused == ()


def test_kind_and_system_are_those_of_instruction_rows():
    fields = {"kind": "Math", "system": "你会算术。", "input": "1+1=?", "chosen": "2", "rejected": "3"}
    (chosen, rejected), _ = rows_of_pair(fields, 1)
    assert (chosen.kind, chosen.turns) == ("Math", (("你会算术。\n1+1=?", "2"),))
    assert rejected.turns == (("你会算术。\n1+1=?", "3"),)
    messages = {"prompt": [message("system", "你会算术。"), *ASKED], "chosen": BETTER, "rejected": WORSE}
    assert rows_of_pair(messages, 1).rows[0].turns[0] == ("你会算术。\n1+1=?", "3")


def test_what_is_not_read_is_named():
    fields = {"input": "问", "chosen": "好", "rejected": "坏", "reason": "它更好", "score": 3, "empty": ""}
    assert rows_of_pair(fields, 1).unused == ("reason",)


BAD = {
    "no chosen": ({"input": "问", "rejected": "坏"}, "no form", "field 'chosen' is missing"),
    "no rejected": ({"input": "问", "chosen": "好"}, "no form", "field 'rejected' is missing"),
    "rejected is null": ({"input": "问", "chosen": "好", "rejected": None}, "no form", "field 'rejected' is missing"),
    "an instruction row": ({"kind": "QA", "input": "问", "target": "好"}, "no form", "this is no pair"),
    "no prompt": ({"chosen": "好", "rejected": "坏"}, "no form", "there is no input or prompt"),
    "equal answers": ({"input": "问", "chosen": "好", "rejected": "好"}, "equal", "the same"),
    "equal but for a closing </s>": ({"input": "问", "chosen": "好", "rejected": "好</s>"}, "equal", "the same"),
    "an empty answer": ({"input": "问", "chosen": "好", "rejected": " "}, "empty", "the rejected answer is empty"),
    "an empty question": ({"input": " ", "chosen": "好", "rejected": "坏"}, "no question", "without a question"),
    "a prompt that ends with an answer": (
        {"prompt": ASKED[:2], "chosen": "好", "rejected": "坏"}, "no question", "without a question"),
    "an answer to an answer": (
        {"prompt": ASKED[:2], "chosen": BETTER, "rejected": WORSE}, "malformed", "an answer must follow a question"),
    "a conversation that ends with a question": (
        {"chosen": ASKED, "rejected": [*ASKED, *WORSE]}, "no answer", "last message of chosen is not by the assistant"),
    "other prompts": (
        {"chosen": [*ASKED, *BETTER], "rejected": [message("user", "2+2=?"), *WORSE]}, "other prompts", "different"),
    "a text beside a list": ({"prompt": ASKED, "chosen": BETTER, "rejected": "坏"}, "malformed", "in one form"),
    "a list beside a text": ({"prompt": "问", "chosen": "好", "rejected": WORSE}, "malformed", "in one form"),
    "messages for a text": ({"prompt": "问", "chosen": BETTER, "rejected": WORSE}, "malformed", "prompt of messages"),
    "a prompt that no conversation asks": (
        {"prompt": "另", "chosen": [*ASKED, *BETTER], "rejected": [*ASKED, *WORSE]}, "malformed", "none of the"),
    "a history beside messages": (
        {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE, "history": [["a", "b"]]}, "malformed", "put its turns"),
    "a history beside a prompt of messages": (
        {"prompt": ASKED, "chosen": "好", "rejected": "坏", "history": [["a", "b"]]}, "malformed", "put its turns"),
    "an instruction beside a prompt": (
        {"instruction": "译", "prompt": "问", "chosen": "好", "rejected": "坏"}, "malformed", "both given"),
    "two questions": (
        {"prompt": [*ASKED, ASKED[0]], "chosen": BETTER, "rejected": WORSE}, "malformed", "two questions"),
    "a system text that comes late": (
        {"prompt": [*ASKED, message("system", "x")], "chosen": BETTER, "rejected": WORSE}, "malformed", "must come"),
    "a role of tools": (
        {"prompt": [message("tool", "x")], "chosen": BETTER, "rejected": WORSE}, "malformed", "none of the known"),
    "two prompts": ({"input": "问", "prompt": "另", "chosen": "好", "rejected": "坏"}, "malformed", "both given"),
}  # fmt: skip


PLAIN = {"input": "问", "chosen": "好", "rejected": "坏"}
LISTED = {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE}

NO_TEXTS = {
    "null": None, "a number": 5, "a truth value": True, "an object": {}, "an empty list": [], "a list": ["好"],
    "an empty text": "", "blanks": " \n", "only </s>": " </s></s>", "half a character": "\ud800",
}  # fmt: skip
NO_MESSAGES = {
    **{name: value for name, value in NO_TEXTS.items() if name != "an empty list"},
    "no role": [{"content": "好"}], "null for a role": [message(None, "好")], "no content": [{"role": "assistant"}],
    **{f"{name} for content": [message("assistant", value)] for name, value in NO_TEXTS.items()},
}  # fmt: skip


def odd_pairs() -> dict[str, dict]:
    """Pairs each of which has in one field what is no proper text, or no messages; or lacks the field."""
    pairs = {}
    for whole, odd in ((PLAIN, NO_TEXTS), (LISTED, NO_MESSAGES)):
        for field in whole:
            pairs[f"{field} of {len(pairs)}, missing"] = {name: whole[name] for name in whole if name != field}
            pairs |= {f"{field} of {len(pairs)}, {name}": {**whole, field: value} for name, value in odd.items()}
    return {name: pair for name, pair in pairs.items() if not (name.startswith("input") and name.endswith("only </s>"))}


@pytest.mark.parametrize("name", odd_pairs())
def test_every_odd_value_of_every_field_is_refused_or_counted(name, tmp_path):
    pair = odd_pairs()[name]
    with pytest.raises(BadRowError) as raised:
        rows_of_pair(pair, 1)
    assert raised_line(raised)
    assert raised.value.fault in (
        "no form", "malformed", "not text", "empty", "no question", "no answer", "equal", "broken characters",
    )  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (PLAIN, pair)))
    with pytest.raises(FireflyError, match=r"pairs\.jsonl:2") as refused:
        list(RowReader(str(path), RowRules(read=rows_of_pair, together=2)))
    assert raised_line(refused)
    reader = RowReader(str(path), RowRules(read=rows_of_pair, together=2, counting_faults=True))
    assert len(list(reader)) == 2
    assert sum(reader.faults.values()) == 1


ANY = st.one_of(VALUES, PROPER, st.sampled_from([ASKED, BETTER, WORSE, [*ASKED, *BETTER]]))


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), ANY))
def test_any_values_give_two_rows_or_are_refused(fields):
    try:
        rows, unused = rows_of_pair(fields, 1)
    except BadRowError:
        return
    assert [len(row.turns) for row in rows] == [len(rows[0].turns)] * 2
    assert rows[0].turns[:-1] == rows[1].turns[:-1]
    assert rows[0].turns[-1][0] == rows[1].turns[-1][0]
    assert rows[0].turns != rows[1].turns
    assert all(row.turns[-1][0].strip() and row.turns[-1][1].strip() for row in rows)
    assert set(unused) <= {"kind"} | {name for name in unused if "." in name}
    assert row_to_answer(fields, 1).rows[0].turns == rows[0].turns


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_pair_is_refused_by_name(fault):
    fields, name, said = BAD[fault]
    with pytest.raises(BadRowError, match=said) as raised:
        rows_of_pair(fields, 1)
    assert raised.value.fault == name
    assert raised_line(raised)


def test_a_file_with_a_bad_pair_is_refused_with_its_line(tmp_path):
    good = {"input": "问", "chosen": "好", "rejected": "坏"}
    file = write_rows(tmp_path / "pairs.jsonl", [good, good | {"rejected": "好"}])
    with pytest.raises(FireflyError) as raised:
        list(RowReader(str(file), RowRules(read=rows_of_pair, together=2)))
    assert raised_line(raised).startswith(f"{file}:2: chosen and rejected are the same")


def test_pairs_are_read_from_every_format(tmp_path):
    plain = [{"input": f"问{at}", "chosen": "好", "rejected": "坏"} for at in range(3)]
    lines = [",".join(plain[0]), *(",".join(row.values()) for row in plain)]
    (tmp_path / "a.csv").write_text("\n".join(lines), "utf-8")
    (tmp_path / "a.tsv").write_text("\n".join(lines).replace(",", "\t"), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(plain), "utf-8")
    write_rows(tmp_path / "a.jsonl", plain)
    pa.parquet.write_table(pa.Table.from_pylist(plain), tmp_path / "a.parquet")
    for name in ("csv", "tsv", "json", "jsonl", "parquet"):
        reader = RowReader(str(tmp_path / f"a.{name}"), RowRules(read=rows_of_pair, together=2))
        asked = [row.turns for row in reader]
        assert asked[0::2] == [((f"问{at}", "好"),) for at in range(3)], name
        assert asked[1::2] == [((f"问{at}", "坏"),) for at in range(3)], name


ANSWERED = {
    "a pair": ({"input": "问", "chosen": "好", "rejected": "坏"}, (("问", "好"),)),
    "a prompt alone": ({"prompt": "问"}, (("问", ""),)),
    "a prompt of messages alone": ({"prompt": ASKED}, (("1+1=?", "3"), ("不对。", ""))),
    "an input alone": ({"kind": "QA", "input": "问"}, (("问", ""),)),
    "conversations": ({"chosen": [*ASKED, *BETTER], "rejected": [*ASKED, *WORSE]}, TURNS[0]),
}


@pytest.mark.parametrize("form", ANSWERED)
def test_the_prompt_of_a_pair_is_answered(form):
    fields, turns = ANSWERED[form]
    (row,), _ = row_to_answer(fields, 1)
    assert row.turns == turns


def test_an_instruction_row_is_answered_as_ever(tmp_path):
    rows = [{"kind": "QA", "input": "问", "target": "答"}, {"instruction": "译", "input": "好", "output": "good"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    read = list(RowReader(str(file), RowRules(answering=True, read=row_to_answer)))
    assert [row.turns for row in read] == [(("问", "答"),), (("译\n好", "good"),)]
