"""What is read off answers: from every target that the templates of a kind make, what it was made of."""

import pytest

from firefly_lightning.evaluation.answer_parsing import corrections, entities, final_answer, label
from firefly_lightning.preparation.templates.reader import load_templates


def filled(kind: str, row: dict) -> list[dict[str, str]]:
    """Through every template, and every target of it."""
    templates = load_templates(kind)
    rows = [made for seed in range(20) for made in templates.fill(row, seed=seed, per_row=None)]
    return [dict(pairs) for pairs in dict.fromkeys(tuple(row.items()) for row in rows)]


def test_entities_of_every_target():
    people, places, none = [["克林顿", "PER"], ["小李", "PER"]], [["华盛顿", "LOC"]], []
    names = {"PER": "人名", "LOC": "地名", "ORG": "机构名"}
    for given in (people + places, people, places, none):
        typed = {(name, names[kind]) for name, kind in given}
        alone = [{(name, "") for name, kind in given if kind == wanted} for wanted in names]
        read = [entities(row["target"]) for row in filled("NER", {"text": "一段话", "entities": given})]
        assert typed in read
        assert all(one in [typed, *alone] for one in read), given


def test_entities_that_a_model_writes_otherwise():
    assert entities("人名：小李，小王；地名：无") == {("小李", "人名"), ("小王", "人名"), ("地名：无", "人名")}
    assert entities("克林顿(人名)，华盛顿（地名）。") == {("克林顿", "人名"), ("华盛顿", "地名")}
    assert entities("") == entities("\n") == entities("无") == set()


@pytest.mark.parametrize(
    ("wrong", "right", "edits"),
    [
        ("今天的天汽真好。", "今天的天气真好。", {(4, "replace", "气")}),
        (
            "帎天他说：我门走巴",
            "今天他说：我们走吧",
            {(0, "replace", "今"), (6, "replace", "们"), (8, "replace", "吧")},
        ),
        ("他他来了\n走吧", "他来了啊哈\n走吧", None),
        ("我喜欢吃平果", "我很喜欢吃苹果", {(1, "insert", "很"), (4, "replace", "苹")}),
    ],
)
def test_the_sentence_is_read_off_through_every_template(wrong, right, edits):
    rows = filled("TextCorrection", {"wrong": wrong, "right": right})
    assert len(rows) > 10
    for row in rows:
        wanted, named, none, undone = corrections(row["input"], row["target"], right, "没有错别字。", wrong)
        assert wanted == named
        assert none == undone == set(), row
        if edits is None:
            assert {(4, "insert", "啊哈")} < wanted
            assert [tag for _, tag, _ in wanted].count("delete") == 1
        else:
            assert wanted == edits, row


def test_a_sentence_without_mistakes_has_no_corrections():
    for row in filled("TextCorrection", {"wrong": "他说：我们走吧。", "right": "他说：我们走吧。"}):
        wanted, none, named = corrections(row["input"], row["target"], "用字正确", "应改为：他说：我们走了。")
        assert wanted == none == set(), row
        assert named == {(6, "replace", "了")} or named == {(6, "replace", "了"), (7, "insert", "")}, row


def test_final_answers_of_every_target():
    rows = filled("Cot", {"question": "几个？", "rationale": "答案不是 3。", "answer": "7 个。"})
    assert {final_answer(row["target"]) for row in rows} == {"7 个", None}
    assert final_answer("答案是3？不对，答案为：4\n因此，最终的答案是：5") == "5"
    assert final_answer("答案是3？不对，最终的答案是：5。") == "5"
    assert final_answer("答案是：\n") is None


def test_labels():
    assert label(" 是好评。\n") == label("是好评") == "是好评"
