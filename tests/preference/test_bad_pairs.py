"""Pairs of which nothing can be learned are counted by name, and what is left is learned and measured in numbers."""

import math

import lightning as L
import pytest

from firefly_lightning import FireflyError, PreferenceDataModule, PreferenceModule
from tests.conftest import write_rows
from tests.support.helpers import fit, logged, one_line, run
from tests.support.pair_runs import PREFERENCE
from tests.support.small_runs import settings

MOST = 48
"""Tokens of a row; the tiny tokenizer has at least one for each of these characters."""

PAIRS = {
    "short": {"input": "问", "chosen": "好", "rejected": "坏"},
    "shorter": {"input": "问问", "chosen": "好", "rejected": "坏坏"},
    "long prompt": {"input": "问" * 60, "chosen": "好", "rejected": "坏"},
    "long answer": {"input": "问", "chosen": "好", "rejected": "坏" * 60},
    "alike at first": {"input": "问", "chosen": "好" * 60, "rejected": "好" * 60 + "坏"},
    "alike at last": {"input": "问", "chosen": "甲" + "好" * 60, "rejected": "乙" + "好" * 60},
}

LEFT = {  # truncated; too long; no target left
    "truncate": (4, 0, 2),
    "truncate_keep_end": (4, 0, 1),
    "drop": (0, 4, 0),
}


@pytest.mark.parametrize("too_long", LEFT)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_what_cutting_leaves_is_counted_and_never_a_nan(too_long, loss, tiny_folder, tmp_path):
    file = str(write_rows(tmp_path / "pairs.jsonl", list(PAIRS.values())))
    data = PreferenceDataModule(
        str(tiny_folder), file, val_files=file, batch_size=2, max_length=MOST, too_long=too_long
    )
    module = PreferenceModule(str(tiny_folder), learning_rate=1e-2, warmup_steps=0, loss=loss)
    trainer = L.Trainer(max_steps=6, val_check_interval=2, check_val_every_n_epoch=None, default_root_dir=tmp_path,
                        **settings(logger=True))  # fmt: skip
    trainer.fit(module, data)
    for batches in (data.train, data.val):
        counts = batches.rows.counts[0]["Preference"]
        assert (counts["truncated"], counts["dropped"], counts["no_target"]) == LEFT[too_long]
        assert len(batches.rows) == len(PAIRS) - counts["dropped"] - counts["no_target"]
    metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert {"train_loss", "val_loss", "val_reward_margin"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.parametrize("most", [1, 2, 4])
def test_where_nothing_is_left_the_run_says_so(most, tiny_folder, tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", list(PAIRS.values()))
    result = fit(tiny_folder, file, tmp_path, *PREFERENCE, "--data.max_length", most, check=False)
    assert f"no row has a target within {most} tokens" in one_line(result)
    assert not (tmp_path / "checkpoints").exists()


STAGES = {"train_files": "fit", "val_files": "fit", "test_files": "test"}


@pytest.mark.parametrize("files", STAGES)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"chosen": None}, "field 'chosen' is missing"),
        ({"rejected": "好"}, "chosen and rejected are the same"),
        ({"rejected": " "}, "the rejected answer is empty"),
        ({"input": ""}, "'input' ends without a question"),
    ],
)
def test_a_bad_pair_is_refused_wherever_it_is_read(files, fault, said, tiny_folder, tmp_path):
    good, bad = (
        str(write_rows(tmp_path / f"{name}.jsonl", [PAIRS["short"], row]))
        for name, row in (("good", PAIRS["shorter"]), ("bad", PAIRS["short"] | fault))
    )
    data = PreferenceDataModule(str(tiny_folder), **({"train_files": good} | {files: bad}))
    with pytest.raises(FireflyError, match=rf"bad\.jsonl:2: {said}"):
        data.prepare_data()


def test_a_prompt_is_answered_whatever_its_answers_are(tiny_folder, tmp_path):
    rows = [PAIRS["short"] | {"rejected": "好"}, {"prompt": "问"}, {"input": "问", "chosen": None, "rejected": None}]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    own = ["--model.path", tiny_folder, "--data.predict_files", file, "--model.decoding.max_new_tokens", 2]
    run(
        "firefly-fit",
        "predict",
        *PREFERENCE,
        *own,
        "--trainer.accelerator",
        "cpu",
        "--trainer.default_root_dir",
        tmp_path,
    )
    (written,) = tmp_path.rglob("predictions.jsonl")
    assert len(written.read_text("utf-8").splitlines()) == 3


def test_a_run_goes_on_with_its_own_loss(tiny_folder, tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", list(PAIRS.values())[:2] * 4)
    own = [*PREFERENCE, "--data.batch_size", 2, "--model.warmup_steps", 0]
    fit(tiny_folder, file, tmp_path, *own, "--trainer.max_steps", 1)
    go_on = ["--trainer.max_steps", 2, "--ckpt_path", "last"]
    for changed, said in {
        "--model.beta 0.5": "model.beta: the checkpoint was trained with 0.3, this run has 0.5; resume with 0.3",
        "--model.loss ipo": "model.loss: the checkpoint was trained with sigmoid, this run has ipo",
        "--model.label_smoothing 0.1": "model.label_smoothing: the checkpoint was trained with 0.0, this run has 0.1",
    }.items():
        line = one_line(fit(tiny_folder, file, tmp_path, *own, *go_on, *changed.split(), check=False))
        assert line.startswith(said)
    fit(tiny_folder, file, tmp_path, *own, *go_on, "--model.share_prompts", "false")
    assert sorted(logged(tmp_path)) == [0, 1]
