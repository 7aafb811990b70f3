"""A plan counts an epoch and the steps as the run does, under every limit that a run can have."""

from types import SimpleNamespace

import pytest

from firefly_lightning.planning.training_rows import training_rows
from tests.data.test_limits import LIMITS, OVERFITTED
from tests.support.small_runs import BATCH_SIZE, plan_rows

UNLIMITED = {
    "limit_train_batches": None, "overfit_batches": 0.0, "fast_dev_run": False, "max_steps": -1, "max_epochs": None,
}  # fmt: skip


def counted(model, rows, **trainer):
    options = {"tokenizer": str(model), "train_files": str(rows), "batch_size": BATCH_SIZE}
    data = SimpleNamespace(class_path="firefly_lightning.FireflyDataModule", init_args=options)
    return training_rows(data, SimpleNamespace(**UNLIMITED | trainer))


@pytest.mark.parametrize("limit", LIMITS)
def test_a_plan_has_the_steps_of_the_run(limit, tiny_folder, short_rows):
    """The steps and epochs are those that the runs of another test make with these settings."""
    arguments, steps, _, epochs = LIMITS[limit]
    found = counted(tiny_folder, short_rows, **arguments)
    assert found.last == steps
    first = found.counts()
    assert first["steps"] == -(-steps // epochs)
    taken = [row for rows in plan_rows(tiny_folder, short_rows, first["steps"]).values() for row in rows]
    assert (first["rows"], first["tokens"]) == (len(taken), found.lengths[taken].sum())


def test_a_plan_counts_windows_of_documents(tiny_folder, tokenizer, tmp_path):
    texts = ["春风又绿江南岸" * 30, "明月何时照我还"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), "utf-8")
    options = {"tokenizer": str(tiny_folder), "train_files": str(path), "batch_size": 2, "max_length": 20, "stride": 5}
    data = SimpleNamespace(class_path="firefly_lightning.FireflyDataModule", init_args=options)
    counts = training_rows(data, SimpleNamespace(**UNLIMITED | {"max_epochs": 1})).counts()
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in texts]
    windows = [1 + max(0, -(-(length - 20) // 15)) for length in lengths]
    assert (counts["rows"], counts["target_tokens"]) == (sum(windows), sum(length - 1 for length in lengths))
    assert counts["tokens"] == sum(lengths) + 5 * (sum(windows) - 2)


@pytest.mark.parametrize("share", OVERFITTED)
def test_a_plan_has_the_rows_that_are_overfitted(share, tiny_folder, short_rows):
    batches, steps = OVERFITTED[share]
    found = counted(tiny_folder, short_rows, overfit_batches=batches, max_epochs=3)
    assert (found.epoch, found.last) == (steps, 3 * steps)
    assert sorted(found.plan.rows(steps)) == sorted(found.plan.rows(0))


def test_a_run_without_limits_has_lightnings_or_no_end(tiny_folder, short_rows):
    assert counted(tiny_folder, short_rows).last == 5 * 1000
    assert counted(tiny_folder, short_rows, max_epochs=-1).last == float("inf")


def test_a_limit_of_tokens_bounds_a_micro_batch(tiny_folder, short_rows):
    found = counted(tiny_folder, short_rows, max_epochs=1)
    limit = int(found.lengths.max())
    load, micro_batches = found.of_tokens(1, BATCH_SIZE, limit)
    tokens = [int(found.lengths[found.plan.rows(step)].sum()) for step in range(int(found.last))]
    assert load.tokens == load.longest == limit
    # As many as hold the heaviest step; of two that follow each other, the rows of both are more than one may have.
    assert max(tokens) / limit <= micro_batches <= 2 * max(tokens) / limit + 1
    whole, once = found.of_tokens(1, BATCH_SIZE, 10**6)
    assert (whole.tokens, once) == (found.heaviest(BATCH_SIZE).tokens, 1)
