import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.templates.fill import UnusableRowError
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER, load_templates
from tests.support.helpers import raised_line
from tests.support.readme import page

SHIPPED = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.yaml"))

COUPLET = {
    "kind": "Couplet",
    "description": "对联",
    "fields": {"first": "上联", "second": "下联"},
    "groups": [
        {"inputs": ["上联：{first}", "请对下联：{first}", "{first}\n下联是什么？"], "targets": "{second}"},
    ],
    "example": {"row": {"first": "春风", "second": "秋月"}, "input": "上联：春风", "target": "秋月"},
}


def write(folder: Path, content: dict, **changes: object) -> Path:
    content = {name: value for name, value in {**content, **changes}.items() if value is not None}
    (folder / f"{content.get('kind', 'Couplet')}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    return folder


def fails(folder: Path, message: str, **changes: object) -> None:
    write(folder, COUPLET, **changes)
    with pytest.raises(FireflyError, match=message):
        load_templates("Couplet", folder)


def test_every_shipped_file_loads_and_has_at_least_six_inputs():
    assert {"Dictionary", "NER", "SentimentAnalyze"} <= set(SHIPPED)
    for kind in SHIPPED:
        inputs = {
            text
            for group in yaml.safe_load((TEMPLATE_FOLDER / f"{kind}.yaml").read_text("utf-8"))["groups"]
            for text in group["inputs"]
        }
        assert len(inputs) >= 6, kind
        assert load_templates(kind).kind == kind


def test_unknown_kind_names_the_nearest_and_all_others():
    with pytest.raises(FireflyError, match=r"'ner'.*did you mean NER\?.*Dictionary, .*NER, .*SentimentAnalyze"):
        load_templates("ner")
    with pytest.raises(FireflyError, match="no templates for the kind 'Xyzzy'; there are templates for"):
        load_templates("Xyzzy")


def test_sentiment_answers_in_the_words_of_the_question():
    words = {"积极": "消极", "正面": "负面", "好评": "差评"}
    templates = load_templates("SentimentAnalyze")
    seen = set()
    for number in range(60):
        row = templates.fill({"text": "房间很大。", "label": "negative"}, number=number)[0]
        good = next(good for good, bad in words.items() if bad == row["target"])
        assert good in row["input"]
        assert "房间很大。" in row["input"]
        seen.add(row["target"])
    assert seen == set(words.values())


def test_ner_lists_each_entity_once_and_says_when_there_is_none():
    templates = load_templates("NER")
    row = {"text": "华罗庚在北京，北京很冷。", "entities": [["华罗庚", "PER"], ["北京", "LOC"], ["北京", "LOC"]]}
    targets = {filled["target"] for number in range(80) for filled in templates.fill(row, number=number)}
    assert targets == {"华罗庚（人名）、北京（地名）", "人名：华罗庚\n地名：北京\n机构名：无", "华罗庚", "北京"}
    nothing = {"text": "天气很好。", "entities": []}
    targets = {filled["target"] for number in range(80) for filled in templates.fill(nothing, number=number)}
    assert targets == {
        "不存在实体",
        "文中没有人名、地名或机构名。",
        "文中没有出现人名。",
        "文中没有出现地名。",
        "人名：无\n地名：无\n机构名：无",
    }


def test_idiom_without_example_is_never_asked_for_one():
    row = {"word": "爱不释手", "explanation": "喜爱得舍不得放手。", "pinyin": None}
    filled = [load_templates("Dictionary").fill(row, number=number)[0] for number in range(60)]
    assert {row["target"] for row in filled} == {"喜爱得舍不得放手。", "爱不释手"}


def test_draws_follow_from_seed_and_number_alone():
    templates = load_templates("Dictionary")
    row = {"word": "甲", "explanation": "乙", "pinyin": "丙", "derivation": "丁", "example": "戊"}
    rows = [templates.fill(row, seed=3, number=number, per_row=4) for number in range(300)]
    assert rows == [templates.fill(row, seed=3, number=number, per_row=4) for number in range(300)]
    assert rows != [templates.fill(row, seed=4, number=number, per_row=4) for number in range(300)]
    assert all(len({filled["input"] for filled in of_row}) == 4 for of_row in rows)
    uses = Counter(filled["input"] for of_row in rows for filled in of_row)
    # 20 inputs serve the row, 1,200 draws: 60 each; 4.5 standard deviations of a binomial are 34.
    assert len(uses) == 20
    assert all(26 < count < 94 for count in uses.values())


def test_more_templates_asked_for_than_there_are(tmp_path):
    rows = load_templates("Couplet", write(tmp_path, COUPLET)).fill({"first": "a", "second": "b"}, per_row=9)
    assert {row["input"] for row in rows} == {"上联：a", "请对下联：a", "a\n下联是什么？"}


@given(
    st.text(min_size=1).filter(str.strip), st.sampled_from(["{", "}", "{first}", "{0}", "%s", "{{x}}", "$a", "\\n", ""])
)
def test_values_come_through_literally(text, odd):
    templates = load_templates("SentimentAnalyze")
    value = text + odd + text
    for row in templates.fill({"text": value, "label": "positive"}, per_row=10):
        assert value in row["input"]
        # What is left of the input is what it is for any other text.
        assert "{" not in row["input"].replace(value, "", 1)
        assert row["target"] in ("积极", "正面", "好评")


@given(st.text(min_size=1).filter(lambda text: text.strip() and "</s>" not in text))
def test_targets_come_through_literally(text):
    row = {"text": "句子", "entities": [["{name}" + text, "PER"]]}
    targets = {filled["target"] for filled in load_templates("NER").fill(row, per_row=99)}
    name = "{name}" + text
    assert {name, f"{name}（人名）", f"人名：{name}\n地名：无\n机构名：无"} <= targets


def test_turn_separator_from_a_value_is_refused_in_a_target_only(tmp_path):
    templates = load_templates("Couplet", write(tmp_path, COUPLET))
    with pytest.raises(UnusableRowError, match="turn separator in text"):
        templates.fill({"first": "a", "second": "b</s>c"})
    for row in templates.fill({"first": "a</s>", "second": "b"}, per_row=3):
        assert "a</s>" in row["input"]


def test_turn_separator_of_a_template_makes_turns(tmp_path):
    groups = [{"inputs": "对：{first}", "targets": "{second}</s>再说一遍</s>{second}"}]
    example = {"row": {"first": "a", "second": "b"}, "input": "对：a", "target": "b</s>再说一遍</s>b"}
    templates = load_templates("Couplet", write(tmp_path, COUPLET, groups=groups, example=example))
    assert templates.fill({"first": "x", "second": "y"})[0]["target"] == "y</s>再说一遍</s>y"


def test_split_fields_and_doubled_braces(tmp_path):
    content = {
        "kind": "ProductDesc",
        "description": "产品文案",
        "fields": {"attributes": "属性", "copy": "文案"},
        "views": {"listed": {"of": "attributes", "split": ["*", "#"], "parts": ["name", "value"],
                             "each": "{name}：{value}", "join": "，"}},
        "groups": [{"inputs": "{{{listed}}}", "targets": "{copy}"}],
        "example": {"row": {"attributes": "颜色#红", "copy": "好看"}, "input": "{颜色：红}", "target": "好看"},
    }  # fmt: skip
    templates = load_templates("ProductDesc", write(tmp_path, content))
    assert templates.fill({"attributes": "类型#裙*风格#简约", "copy": "好"})[0]["input"] == "{类型：裙，风格：简约}"
    with pytest.raises(FireflyError, match=r"a:7: field 'attributes'.*must have the parts name, value"):
        templates.fill({"attributes": "类型#裙*简约", "copy": "好"}, "a:7")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "NER",
            {"text": "x"},
            "f.jsonl:3: NER needs the field entities; its templates read text, entities, the row has text; map",
        ),
        ("NER", {"text": "x", "entities": "北京"}, "f.jsonl:3: field 'entities' must be a list, this is str"),
        ("NER", {"text": "x", "entities": [["北京"]]}, "f.jsonl:3: .*must have the parts name, type"),
        ("NER", {"text": "x", "entities": [["北京", "GPE"]]}, "'GPE'; its templates know only PER, LOC, ORG"),
        ("NER", {"text": {"a": 1}, "entities": []}, "field 'text' must be text or a number, this is dict"),
        ("NER", {"text": "\ud800", "entities": []}, "half a surrogate pair"),
        ("SentimentAnalyze", {"text": "x", "label": 1}, "'1'; its templates know only positive, negative"),
        ("SentimentAnalyze", {"text": " ", "label": "positive"}, "f.jsonl:3: no template serves .* text is empty"),
        ("Dictionary", {"word": "x", "explanation": ""}, "f.jsonl:3: no template serves .*explanation"),
    ],
)
def test_rows_that_are_wrong(kind, row, message):
    with pytest.raises(FireflyError, match=message):
        load_templates(kind).fill(row, "f.jsonl:3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [{"inputs": "{frist}", "targets": "{second}"}]}, "group 1: inputs: .*names frist.* first, second"),
        ({"groups": [{"inputs": "{first", "targets": "{second}"}]}, "group 1: inputs: .*written twice"),
        ({"groups": [{"inputs": "{first!r}", "targets": "{second}"}]}, "a name in braces and nothing more"),
        ({"groups": [{"inputs": "{first.x}", "targets": "{second}"}]}, "names first.x"),
        ({"groups": [{"inputs": ["a", "a"], "targets": "{second}"}]}, "the same text is there twice"),
        ({"groups": [{"inputs": [], "targets": "{second}"}]}, "at least one input and one target"),
        ({"groups": [{"inputs": [3], "targets": "{second}"}]}, "must be a list of texts"),
        ({"groups": [{"inputs": "a", "targets": "b", "without": ["third"]}]}, "without: names third"),
        ({"groups": [{"inputs": "a"}]}, "group 1: targets is missing"),
        ({"groups": {}}, "groups must be a list"),
        ({"groups": None}, "groups is missing"),
        ({"inputs": ["a"]}, "names inputs, but there are only kind"),
        ({"fields": ["first"]}, "fields: must be a mapping, this is list"),
        ({"optional": ["third"]}, "optional: names third"),
        ({"views": {"v": {"of": "third", "values": {}}}}, "view v: names third"),
        ({"views": {"v": {"of": "first", "value": {}}}}, "view v: values is missing"),
        ({"views": {"v": {"of": "first", "each": "{x}", "join": ""}}}, "view v: each: .*names x.*only item"),
        ({"views": []}, "views: must be a mapping"),
        ({"example": {"row": {"first": "a", "second": "b"}, "input": "a", "target": "b"}}, "no template gives"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(tmp_path, changes, message):
    fails(tmp_path, f"Couplet.yaml: .*{message}|{message}", **changes)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "Couplet.yaml"
    path.write_text("kind: [", "utf-8")
    with pytest.raises(FireflyError, match="not YAML"):
        load_templates("Couplet", tmp_path)
    path.write_bytes("kind: 对联".encode("gbk"))
    with pytest.raises(FireflyError, match=r"not UTF-8|not YAML"):
        load_templates("Couplet", tmp_path)
    path.write_text(json.dumps({**COUPLET, "kind": "Other"}), "utf-8")
    with pytest.raises(FireflyError, match="must be the name of the file, Couplet"):
        load_templates("Couplet", tmp_path)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (["春风"], "example: must be a mapping, this is list"),
        (
            {"row": {"first": "春风", "second": "秋月"}, "input": ["上联：春风"], "target": "秋月"},
            "'input' must be text",
        ),
        (
            {"row": {"first": "春风", "second": "秋月"}, "input": "上联：春风", "target": {"a": "秋月"}},
            "'target' must be",
        ),
        ({"row": ["春风"], "input": "上联：春风", "target": "秋月"}, "example: row: must be a mapping, this is list"),
        (
            {"row": {"first": ["春风"], "second": "秋月"}, "input": "上联：春风", "target": "秋月"},
            "'first' must be text",
        ),
    ],
)
def test_an_example_of_other_types_is_told_in_one_line(tmp_path, example, message):
    fails(tmp_path, message, example=example)


@pytest.mark.parametrize("part", ["inputs", "targets"])
def test_half_a_character_in_a_template_is_told(tmp_path, part):
    whole = {"inputs": ["上联：{first}"], "targets": ["{second}"]}
    half = {**whole, part: ["{first}\ud800"]}
    path = write(tmp_path, COUPLET) / "Couplet.yaml"
    path.write_text(json.dumps({**COUPLET, "groups": [whole, half]}))  # YAML has the escapes of JSON
    with pytest.raises(FireflyError, match=f"group 2: {part}: .* half a surrogate pair") as raised:
        load_templates("Couplet", tmp_path)
    raised_line(raised)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 5000 + "]" * 5000, "a: 2024-99-99", "a: !!python/object:os.x {}", "a: [1"]
)
def test_what_is_no_plain_yaml_is_told_in_one_line(tmp_path, text):
    (tmp_path / "Couplet.yaml").write_text(text, "utf-8")
    with pytest.raises(FireflyError, match=r"Couplet\.yaml: not YAML: ") as raised:
        load_templates("Couplet", tmp_path)
    raised_line(raised)


def test_words_count_outside_of_longer_texts_only(tmp_path):
    words = {"first": {"words": ["该", "文中"], "unless": ["应该", "英文中"]}, "second": ["<UNK>"]}
    templates = load_templates("Couplet", write(tmp_path, COUPLET, unusable=words))
    for first, second, word in (
        ("应该", "好", None), ("该河", "好", "该"), ("应该走该路", "好", "该"), ("英文中", "好", None),
        ("文中", "好", "文中"), ("好", "<UNK>", "<UNK>"), ("好", "该", None),
    ):  # fmt: skip
        if word:
            with pytest.raises(UnusableRowError, match=f"holds {word}"):
                templates.fill({"first": first, "second": second})
        else:
            assert templates.fill({"first": first, "second": second})
    for wrong in (
        {"first": {"unless": ["x"]}},
        {"first": {"words": [5]}},
        {"third": ["x"]},
        {"first": {"word": ["x"]}},
    ):
        fails(tmp_path, r"unusable", unusable=wrong)


QUESTIONS = [  # of CMRC 2018, which the words were checked on
    ("该动画在哪个频道放送？", True),
    ("文中提到的典型的归纳偏置例子叫什么？", True),
    ("这张专辑的主题是什么？", True),
    ("1994年他加盟了什么队？", True),
    ("在吴锦发看来，台湾人民应该重拾什么美德？", False),
    ("渗透一词在英文中的意思是什么？", False),
    ("在《寻秦记》这部小说里，嬴政的真是姓名叫什么？", False),
    ("哪个媒体采用「quake lake」（地震湖）一词后，该词普遍被世界各地的英文媒体采用？", False),
    ("“观念是创造艺术作品的机器”这一论断来自于谁？", False),
    ("为表彰艾里森为科幻小说事业所作的贡献，他被授予了什么称号？", False),
    ("感冒了该怎么办？", False),
    ("中国历史上文学成就最高的是谁？", False),
]


@pytest.mark.parametrize(("question", "left_out"), QUESTIONS)
def test_questions_that_need_their_passage_are_left_out_and_others_are_not(question, left_out):
    templates = load_templates("OpenQA")
    if left_out:
        with pytest.raises(UnusableRowError):
            templates.fill({"question": question, "answer": "答"})
    else:
        assert templates.fill({"question": question, "answer": "答"})


@pytest.mark.parametrize("language", ["en", "zh"])
def test_words_that_leave_a_row_out_are_documented(language):
    documented = {}
    rows = re.findall(r"^\| `(\w+)`[:：] ?(`.*?`) \| (`.*`) \|$", page("building", language), re.MULTILINE)
    for kind, fields, words in rows:
        for name in re.findall(r"`(\w+)`", fields):
            documented[kind, name] = tuple(re.findall(r"`([^`]+)`", words))
    used = {
        (kind, name): words.words for kind in SHIPPED for name, words in load_templates(kind).unusable.items()
    }  # fmt: skip
    assert used == documented
    assert len(used) >= 12
