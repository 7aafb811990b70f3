"""Every kind on a few rows written for it: each template of the package reads well and is answered rightly."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from firefly_lightning.preparation.templates.fill import UnusableRowError
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER, load_templates

KINDS = [
    "AncientPoem", "ClassicalChinese", "Composition", "Cot", "Couplet", "Dictionary", "JinYongGeneration",
    "KeywordRecognition", "LyricGeneration", "MRC", "MusicComment", "NER", "NLI", "OpenQA", "ProductDesc", "Program",
    "ProseGeneration", "SentimentAnalyze", "StoryGeneration", "Summary", "TextCorrection", "TextMatching",
    "Translation",
]  # fmt: skip

POEM = ["绿树遮窗影，清风入旧书。", "闲来无一事，听雨到更初。"]
PASSAGE = {
    "opening": "雨停了，巷口的灯",
    "continuation": "一盏一盏亮起来。",
    "title": "雨巷",
    "book": "小城",
    "author": "林舟",
}
ROWS = {
    "AncientPoem": {"title": "夏夜", "author": "林舟", "theme": "闲居", "form": "五言绝句", "paragraphs": POEM},
    "ClassicalChinese": {"classical": "学而时习之，不亦说乎？", "modern": "学了又时常温习，不是很愉快吗？"},
    "Composition": {
        "title": "雨后", "content": "雨停了，我踩着水花回家。", "genre": "记叙文", "grade": "五年级",
        "requirement": "写出真情实感。",
    },
    "Cot": {"question": "3 个苹果吃掉 1 个还剩几个？", "rationale": "3 - 1 = 2。", "answer": 2},
    "Couplet": {"first": "绿水青山千载画", "second": "清风明月一窗诗"},
    "Dictionary": {
        "word": "守株待兔", "pinyin": "shǒu zhū dài tù", "explanation": "比喻不主动努力。",
        "derivation": "《韩非子》。", "example": "不能守株待兔。",
    },
    "JinYongGeneration": PASSAGE,
    "KeywordRecognition": {"abstract": "本文研究小麦的抗寒性。", "keywords": "小麦_抗寒性"},
    "LyricGeneration": {"title": "远行", "lyrics": "风吹过\n风吹过\n你走了", "artist": "林舟", "theme": "离别"},
    "MRC": {"passage": "洱海在云南大理。", "question": "洱海在哪里？", "answer": "云南大理"},
    "MusicComment": {"song": "远行", "comment": "听哭了。", "artist": "林舟", "lyric": "你走了"},
    "NER": {"text": "大理大学的林舟到了。", "entities": [["大理大学", "ORG"], ["林舟", "PER"], ["大理", "LOC"]]},
    "NLI": {"premise": "他在跑步", "hypothesis": "他在睡觉", "label": "contradiction"},
    "OpenQA": {"question": "洱海在哪里？", "answer": "云南大理"},
    "ProductDesc": {"attributes": "类型#裙*颜色#白", "copy": "白色长裙，清爽大方。"},
    "Program": {"task": "求两数之和。", "code": "print(1 + 2)", "language": "Python"},
    "ProseGeneration": {**PASSAGE, "topic": "故乡的雨"},
    "SentimentAnalyze": {"text": "房间很干净。", "label": "positive"},
    "StoryGeneration": {**PASSAGE, "topic": "雨夜来客"},
    "Summary": {"abstract": "昨夜大雨，多条道路积水，今晨已恢复通行。", "title": "大雨积水道路恢复通行"},
    "TextCorrection": {"wrong": "今天天汽很好。", "right": "今天天气很好。"},
    "TextMatching": {"a": "几点了", "b": "现在几点", "same": 1},
    "Translation": {"en": "It is raining.", "zh": "下雨了。"},
}  # fmt: skip

ANSWERS = {
    "AncientPoem": {"\n".join(POEM), POEM[1]},
    "ClassicalChinese": {"学而时习之，不亦说乎？", "学了又时常温习，不是很愉快吗？"},
    "Cot": {"3 - 1 = 2。\n因此，最终的答案是：2", "2"},
    "Couplet": {"下联：清风明月一窗诗", "清风明月一窗诗", "上联：绿水青山千载画"},
    "KeywordRecognition": {"小麦、抗寒性", "关键词：小麦、抗寒性", "小麦\n抗寒性"},
    "LyricGeneration": {"风吹过\n风吹过\n你走了", "风吹过\n你走了"},
    "NLI": {"矛盾", "错误", "不是"},
    "Program": {"print(1 + 2)", "```Python\nprint(1 + 2)\n```"},
    "ProseGeneration": {"一盏一盏亮起来。", "雨停了，巷口的灯一盏一盏亮起来。"},
    "TextCorrection": {
        "今天天气很好。", "有错别字，应改为：今天天气很好。", "有。正确的句子是：今天天气很好。",
        "不正确，应改为：今天天气很好。",
    },
    "TextMatching": {"相同", "是", "相似"},
    "Translation": {"It is raining.", "下雨了。"},
}  # fmt: skip
"""What the rows above must be answered with, over all templates."""


def filled(kind: str, row: dict, seeds: int = 1) -> list[dict[str, str]]:
    templates = load_templates(kind)
    return [made for seed in range(seeds) for made in templates.fill(row, seed=seed, per_row=None)]


def test_there_are_templates_for_the_23_kinds_of_the_original():
    assert sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.yaml")) == KINDS == sorted(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_of_a_kind_reads_well(kind):
    content = yaml.safe_load((TEMPLATE_FOLDER / f"{kind}.yaml").read_text("utf-8"))
    # What is asked of a row with everything in it; the others are for rows without entities, or without mistakes.
    served = [group for group in content["groups"] if not group.get("without") and not group.get("equal")]
    rows = filled(kind, ROWS[kind])
    inputs = {row["input"] for row in rows}
    assert len(rows) == len(inputs) == sum(len(group["inputs"]) for group in served) >= 6
    # A table of characters that may stand side by side: a colon may end a line before any text.
    doubled = re.compile("[，。；：、！？]{2}|[。，；]”[。，！？]|[ 　]$|^[ 　]|[{}]|\n{3}|  ")
    for row in rows:
        code = kind in ("Program", "Cot")
        assert not doubled.search(row["input"]), row
        assert code or not doubled.search(row["target"]), row
        assert row["target"].strip() == row["target"]
        assert row["target"] != row["input"]


@pytest.mark.parametrize("kind", sorted(ANSWERS))
def test_targets_answer(kind):
    assert {row["target"] for row in filled(kind, ROWS[kind], seeds=20)} == ANSWERS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_kept_apart(kind):
    """A target that is in its own input would give the answer away, where the answer is not one of named choices."""
    given_away = {"TextMatching", "NLI", "SentimentAnalyze", "MRC", "NER"}
    for row in filled(kind, ROWS[kind]):
        if kind not in given_away:
            assert row["target"] not in row["input"], row


def test_poems_are_asked_for_by_title_theme_first_line_and_form():
    rows = filled("AncientPoem", ROWS["AncientPoem"])
    for part in ("《夏夜》", "闲居", POEM[0], "五言绝句", "林舟"):
        assert any(part in row["input"] for row in rows), part
    for row in rows:
        assert (row["target"] == POEM[1]) == (POEM[0] in row["input"])
    bare = filled("AncientPoem", {"paragraphs": "\n".join(POEM)})
    assert {row["target"] for row in bare} == {POEM[1]}


def test_a_sentence_without_mistakes_is_called_so():
    rows = filled("TextCorrection", {"wrong": "天气很好。", "right": "天气很好。"}, seeds=20)
    assert {row["target"] for row in rows} == {"没有错别字。", "这句话没有错别字。", "用字正确。", "天气很好。"}
    for row in rows:
        assert (row["target"] == "天气很好。") == ("照原样" in row["input"] or "保持不变" in row["input"])


@pytest.mark.parametrize(
    ("label", "answers"),
    [("entailment", {"蕴含", "正确", "是"}), ("neutral", {"中立", "无法判断", "不确定"})],
)
def test_relations_of_sentences(label, answers):
    rows = filled("NLI", {"premise": "他在跑步", "hypothesis": "他在动", "label": label})
    assert {row["target"] for row in rows} == answers
    for row in rows:
        assert f"“{row['target']}”" in row["input"] or row["target"] in row["input"]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("ProductDesc", {"attributes": "类型#裙", "copy": "BRAND的裙子"}, "copy holds BRAND"),
        ("OpenQA", {"question": "文中提到了谁？", "answer": "林舟"}, "question holds 文中"),
        ("StoryGeneration", {"opening": "<strong>第一回", "continuation": "话说"}, "opening holds <strong>"),
        ("ClassicalChinese", {"classical": "大学", "modern": "大学"}, "classical and modern are the same"),
        ("MRC", {"passage": "甲", "question": "乙", "answer": "丙</s>丁"}, "turn separator in text"),
    ],
)
def test_rows_that_cannot_be_used_say_why(kind, row, reason):
    with pytest.raises(UnusableRowError, match=reason):
        load_templates(kind).fill(row)


ODD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.sampled_from(["Couplet", "MRC", "Summary", "Translation"]), st.data())
def test_nothing_in_a_field_is_interpreted(kind, data):
    """Braces, names of fields, ``</s>`` and any Unicode come through as they are, in every template."""
    templates = load_templates(kind)
    marks = st.sampled_from(["{", "}}", "{first}", "{title}", "</s>", "%s", "\\1", "$a", ""])
    row = {name: data.draw(ODD) + data.draw(marks) + data.draw(ODD) for name in templates.fields}
    for group in templates.groups:
        for template in group.inputs + group.targets:
            plain = template.fill(dict.fromkeys(row, "\0"))
            made = template.fill(row)
            values = [row[name] for _, name in template.pieces if name is not None]
            parts = plain.split("\0")
            expected = "".join(part + value for part, value in zip(parts, [*values, ""], strict=True))
            assert made == expected
    try:
        rows = templates.fill(row, per_row=None)
    except UnusableRowError:
        assert any("</s>" in value for value in row.values())
    else:
        assert all(made["target"].count("</s>") == 0 for made in rows)
