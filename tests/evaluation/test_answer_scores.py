"""`firefly-fit test`: scores of stock Bloom's greedy answers by slow references, on one device and two processes."""

from collections import defaultdict

import pytest
import sacrebleu
import torch

from firefly_lightning.evaluation.answer_parsing import corrections, entities
from firefly_lightning.evaluation.answer_scores import AnswerScores
from tests.conftest import write_rows
from tests.support.helpers import logged, run, run_ranks
from tests.support.predicting import DECODING, answers, predicted, teach

ROWS = [
    ("Couplet", "对下联：春风又绿江南岸", "下联：明月何时照我还"),
    ("Couplet", "对下联：海内存知己", "下联：天涯若比邻"),
    ("Couplet", "对下联：爆竹声中一岁除，春风送暖入屠苏", "下联：千门万户曈曈日，总把新桃换旧符"),
    ("NLI", "他在跑步。他在动？", "蕴含"),
    ("NLI", "他在跑步。他在睡觉？", "矛盾"),
    ("SentimentAnalyze", "很好", "是好评。"),
    ("NER", "找出人名：小李和小王", "小李（人名）、小王（人名）"),
    ("NER", "找出人名：天晴了", "不存在实体"),
    ("TextCorrection", "文本纠错：今天的天汽真好", "今天的天气真好"),
    ("TextCorrection", "文本纠错：他们去北京了", "没有错别字。"),
    ("Cot", "几个？", "三个。\n因此，最终的答案是：3"),
    ("Cot", "直接答：几个？", "4"),
    ("我的题", "问", "答案就是这样。"),
]
"""Thirteen, so that the last micro-batch is short; kinds of one row are missing from one of two ranks."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    named = [dict(zip(("kind", "input", "target"), row, strict=True)) for row in ROWS]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", named)


@pytest.fixture(scope="module")
def taught(model_folder, rows, tmp_path_factory):
    """Knows some of the answers."""
    return teach(model_folder, rows, tmp_path_factory.mktemp("taught"), steps=26)


@pytest.fixture(scope="module")
def answered(taught, rows):
    return answers(taught, [rows])


@pytest.fixture(scope="module")
def expected(answered) -> dict[str, float]:
    of_kind = defaultdict(list)
    for row in answered:
        of_kind[row["kind"]].append(row)
    found = {}
    for kind in ("Couplet", "Cot", "我的题"):
        given, wanted = ([row[side] for row in of_kind[kind]] for side in ("generated", "target"))
        found[f"bleu_of/{kind}"] = sacrebleu.corpus_bleu(given, [wanted], tokenize="char").score
        found[f"chrf_of/{kind}"] = sacrebleu.corpus_chrf(given, [wanted]).score
        found[f"rouge_l_of/{kind}"] = mean([100 * rouge_l(*pair) for pair in zip(given, wanted, strict=True)])
    for kind in ("NLI", "SentimentAnalyze"):
        found[f"exact_match_of/{kind}"] = mean(
            [row["generated"].strip("。 ") == row["target"].strip("。") for row in of_kind[kind]]
        )
    found["answer_accuracy_of/Cot"] = float(of_kind["Cot"][0]["generated"].endswith("因此，最终的答案是：3"))
    named = [(entities(row["target"]), entities(row["generated"])) for row in of_kind["NER"]]
    found |= {f"entity_{name}_of/NER": value for name, value in sets(named, 1).items()}
    edits = [tuple(corrections(row["input"], row["target"], row["generated"])) for row in of_kind["TextCorrection"]]
    return found | {f"edit_{name}_of/TextCorrection": value for name, value in sets(edits, 0.5).items()}


def mean(values) -> float:
    return sum(values) / len(values)


def rouge_l(given: str, wanted: str) -> float:
    given, wanted = "".join(given.split()), "".join(wanted.split())
    longest = [[0] * (len(wanted) + 1) for _ in range(len(given) + 1)]
    for i, one in enumerate(given):
        for j, other in enumerate(wanted):
            longest[i + 1][j + 1] = longest[i][j] + 1 if one == other else max(longest[i][j + 1], longest[i + 1][j])
    return 2 * longest[-1][-1] / (len(given) + len(wanted))


def sets(pairs, beta) -> dict[str, float]:
    common = sum(len(wanted & named) for wanted, named in pairs)
    precision = common / sum(len(named) for _, named in pairs)
    recall = common / sum(len(wanted) for wanted, _ in pairs)
    f = (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if common else 0.0
    return {"precision": precision, "recall": recall, f"f{beta:g}": f}


def command(taught, rows, root, *more):
    return [
        "firefly-fit", "test", "--model.path", taught, "--data.test_files", rows, "--data.batch_size", 4, *DECODING,
        "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip


def check(expected, answered, root) -> None:
    assert 0 < expected["bleu_of/Couplet"] < 100, "knows some"
    assert len({0.0, 1.0, 100.0}.intersection(expected.values())) < len({*expected.values()}), "and others in part"
    columns = {name: logged(root, f"test_{name}") for name in expected}
    found = {name: float(next(iter(values.values()))) for name, values in columns.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert logged(root, "test_accuracy_of/Couplet")
    assert predicted(root, 0) == answered


def test_scores_on_one_device(expected, answered, taught, rows, tmp_path):
    printed = run(*command(taught, rows, tmp_path)).stdout
    check(expected, answered, tmp_path)
    for name, value in expected.items():
        assert all(part in printed for part in name.split("_of/"))
        assert f"{float(value):,.4g}" in printed


def test_scores_on_two_processes(expected, answered, taught, rows, tmp_path):
    more = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--trainer.enable_progress_bar", "false"]
    run_ranks(2, command(taught, rows, tmp_path, *more))
    check(expected, answered, tmp_path)


def test_kinds_without_rows_have_no_scores():
    scores = AnswerScores(["Couplet", "NLI", "NER", "TextCorrection", "Cot"])
    row = {"row": 0, "kind": "Couplet", "input": "", "target": "甲乙丙丁", "generated": "甲乙丙丁"}
    scores.update([row])
    found = scores.compute(torch.device("cpu"))
    assert found == {
        "bleu_of/Couplet": pytest.approx(100), "chrf_of/Couplet": 100, "rouge_l_of/Couplet": 100,
    }  # fmt: skip


def test_nothing_wanted_and_nothing_named_is_right():
    scores = AnswerScores(["NER"])
    scores.update([{"row": 0, "kind": "NER", "input": "", "target": "不存在实体", "generated": "无"}])
    assert scores.compute(torch.device("cpu")) == {
        "entity_precision_of/NER": 1,
        "entity_recall_of/NER": 1,
        "entity_f1_of/NER": 1,
    }
