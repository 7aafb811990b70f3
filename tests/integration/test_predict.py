"""Under every strategy, `predict` and `test` give the answers of stock Hugging Face, in the order of the files."""

import json
from pathlib import Path

import pytest
import sacrebleu

from tests.conftest import write_rows
from tests.integration.test_parity import REFUSED, SPELLED_OUT, STRATEGIES
from tests.support.choice import DIVIDED
from tests.support.helpers import logged, run, run_ranks
from tests.support.predicting import DECODING, answers, predicted, teach

ALIKE = ("zero1", "zero2", "zero2_offload", "zero3_offload", "gemini_offload") if DIVIDED else ()
"""Strategies that compute as others do, and only keep something else in another place."""

SAMPLED = ["--model.decoding.temperature", 5.0, "--model.decoding.max_new_tokens", 12]


@pytest.fixture(scope="module")
def rows(rows_file, tmp_path_factory) -> Path:
    """Nine: two ranks with micro-batches of four have one left, and one of them has nothing to do."""
    lines = rows_file.read_text("utf-8").splitlines()[:9]
    return write_rows(tmp_path_factory.mktemp("rows") / "nine.jsonl", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def other_rows(rows, tmp_path_factory) -> Path:
    """The same with other answers."""
    lines = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    targets = [line["target"] for line in lines]
    changed = [{**line, "target": target} for line, target in zip(lines, targets[1:] + targets[:1], strict=True)]
    return write_rows(tmp_path_factory.mktemp("rows") / "other.jsonl", changed)


@pytest.fixture(scope="module")
def taught(odd_folder, rows, tmp_path_factory) -> Path:
    return teach(odd_folder, rows, tmp_path_factory.mktemp("taught"))


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in (*REFUSED, *ALIKE)])
def test_answers_are_those_of_stock_hugging_face(strategy, taught, rows, other_rows, tmp_path):
    processes, shares = STRATEGIES[strategy]
    common = [
        "--model.path", taught, "--trainer.default_root_dir", tmp_path, "--data.batch_size", 8,
        "--data.micro_batch_size", 4,
        "--trainer.strategy", SPELLED_OUT.get(strategy, strategy),
        "--trainer.devices", processes, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    fit = ["firefly-fit", "fit", *common, "--data.train_files", other_rows, "--trainer.max_steps", 4]
    predict = ["firefly-fit", "predict", *common, "--data.predict_files", rows]
    run_ranks(
        processes,
        [*fit, "--model.learning_rate", 5e-3, "--model.warmup_steps", 0],
        [*predict, *DECODING, "--ckpt_path", "last"],
        [*predict, *DECODING, "--trainer.precision", "bf16-mixed"],
        [*predict, *SAMPLED],
        [*predict, *SAMPLED, "--model", "tests.support.predicting.Recorded"],
        ["firefly-fit", "test", *common, "--data.test_files", rows, *DECODING],
    )
    run("firefly", "export", "--checkpoint", tmp_path / "checkpoints", "--out", tmp_path / "exported")
    before, after = answers(taught, [rows]), answers(tmp_path / "exported", [rows])
    assert before != after
    assert len({len(row["generated"]) for row in before}) > 3, "ranks are done at different times"
    trained, rounded, sampled, again = (predicted(tmp_path, version) for version in range(1, 5))
    assert trained == after
    assert sum(map(dict.__eq__, rounded, before)) >= 7, "what was learned by heart outlives rounding"
    assert sampled == again != before, "sampled, and repeatable"
    by_rank = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    if shares == 1:
        assert all(answered == by_rank[0] for answered in by_rank), "ranks that split a model draw the same"
    else:
        assert [len(answered) for answered in by_rank] == [5, 4], "the second has nothing to do at the end"
    assert not list((tmp_path / "lightning_logs").rglob(".predictions*"))
    assert predicted(tmp_path, 5) == before
    given, wanted = ([row[side] for row in before if row["kind"] == "Summary"] for side in ("generated", "target"))
    bleu = sacrebleu.corpus_bleu(given, [wanted], tokenize="char")
    (logged_bleu,) = logged(tmp_path, "test_bleu_of/Summary", 5).values()
    assert float(logged_bleu) == pytest.approx(bleu.score)
