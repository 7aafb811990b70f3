"""The best checkpoint has a name that a file can have, whatever the monitored metric is called."""

import pytest

from firefly_lightning.callbacks.checkpoints import BestCheckpoint
from firefly_lightning.model.metric_names import of_kind
from tests.conftest import write_rows
from tests.support.small_runs import train

NAMES = ["NER", "QA: zh", "a/b", "对联", "{kind}", "{", "..", "a\nb", "$x|y*?", "很长的名字" * 30, "a" * 300, "", " "]
"""Kinds whose names no file can have, or none on every system, and some that every one can have."""


@pytest.mark.parametrize("kind", NAMES)
def test_every_kind_can_be_monitored(tiny_folder, tmp_path, kind):
    rows = [{"kind": kind, "input": f"说{index}", "target": f"好{index % 7}"} for index in range(16)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    best = BestCheckpoint(of_kind("val_perplexity", kind), dirpath=str(tmp_path / "checkpoints"))
    noting = train(tiny_folder, file, tmp_path, [best], max_steps=2, data={"val_files": str(file)},
                   val_check_interval=1)  # fmt: skip
    assert set(noting.validated) == {1, 2}
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(saved) == 2
    assert saved[1] == "last.ckpt"
    assert saved[0].startswith(f"best-step={2 if '=2-' in saved[0] else 1}-val_perplexity_of_")
    assert saved[0].endswith(f"={float(best.best_model_score):.4f}.ckpt")
    assert (tmp_path / "checkpoints" / saved[0] / "checkpoint.json").is_file()


def test_the_name_that_a_metric_had_before_is_taken_for_that_of_today():
    assert BestCheckpoint("val_perplexity/NER").monitor == "val_perplexity_of/NER"
    assert BestCheckpoint("val_bleu/mine").monitor == "val_bleu/mine", "of another module"


def test_a_plain_name_stays_as_it_was(tmp_path):
    name = BestCheckpoint(dirpath=str(tmp_path)).format_checkpoint_name({"step": 5, "val_loss": 1.25})
    assert name == f"{tmp_path}/best-step=5-val_loss=1.2500.ckpt"
