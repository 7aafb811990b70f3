"""Limits count whole optimizer steps: a step has its rows under any of them, in one run and in a resumed one."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from firefly_lightning import FireflyError, FireflyModule
from tests.support.helpers import raised_line
from tests.support.small_runs import BATCH_SIZE, make_data, plan_rows, settings, train

MICRO_BATCHES = [8, 1]


@pytest.fixture(scope="module")
def planned(tiny_folder, short_rows) -> dict[int, list[int]]:
    planned = plan_rows(tiny_folder, short_rows, 12)
    assert [len(rows) for rows in planned.values()] == 2 * [8, 8, 8, 8, 6] + [8, 8]
    return planned


def by_step(noting) -> dict[int, list[int]]:
    return {step: sorted(rows) for step, rows in noting.rows.items()}


LIMITS = {
    "a number of steps": ({"limit_train_batches": 2, "max_steps": 6}, 6, [2, 4, 6], 3),
    "a share of the steps": ({"limit_train_batches": 0.4, "max_epochs": 2}, 4, [2, 4], 2),
    "more than there are": ({"limit_train_batches": 50, "max_epochs": 2}, 10, [5, 10], 2),
    "one step": ({"limit_train_batches": 1, "max_epochs": 3}, 3, [1, 2, 3], 3),
    "all": ({"limit_train_batches": 1.0, "max_epochs": 1}, 5, [5], 1),
    "with an interval": (
        {"limit_train_batches": 4, "max_epochs": 2, "val_check_interval": 3}, 8, [3, 7], 2),
    "with an interval over epochs": (
        {"limit_train_batches": 4, "max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None},
        8, [3, 6], 2),
    "with a share of an epoch": ({"limit_train_batches": 4, "max_epochs": 2, "val_check_interval": 0.5}, 8,
                                 [2, 4, 6, 8], 2),
    "every second epoch": ({"limit_train_batches": 2, "max_epochs": 4, "check_val_every_n_epoch": 2}, 8, [4, 8], 4),
    "loaders made anew": (
        {"limit_train_batches": 2, "max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, 6, [2, 4, 6], 3),
    "fewer steps than an epoch": ({"limit_train_batches": 4, "max_steps": 3}, 3, [], 1),
    "at least so many": ({"limit_train_batches": 2, "max_epochs": 3, "min_epochs": 2, "min_steps": 3}, 6,
                         [2, 4, 6], 3),
    "a dry run": ({"fast_dev_run": 2}, 2, [2], 1),
}  # fmt: skip
"""By its name, a limit: the trainer's arguments; steps, steps before each validation, and epochs of the run."""


@pytest.mark.parametrize("size", MICRO_BATCHES)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_step_has_its_rows_under_every_limit(tiny_folder, short_rows, short_val_rows, tmp_path, planned, limit, size):
    arguments, steps, validated, epochs = LIMITS[limit]
    data = {"micro_batch_size": size, "val_files": str(short_val_rows)}
    noting = train(tiny_folder, short_rows, tmp_path, data=data, **arguments)
    assert by_step(noting) == {step: planned[step] for step in range(steps)}
    assert [step for step in noting.validated if step] == validated
    assert noting.epoch == epochs


def test_the_schedule_ends_with_the_limited_epochs(tiny_folder, short_rows, tmp_path):
    noting = train(tiny_folder, short_rows, tmp_path, limit_train_batches=2, max_epochs=3)
    # Two steps of warm-up, and half a cosine that ends after the sixth step.
    assert noting.rates[5] == pytest.approx(1e-2 * 0.1464466, rel=1e-5)


OVERFITTED = {"a number of steps": (2, 2), "a share of the steps": (0.6, 3), "all": (1.0, 5), "one step": (1, 1)}


@pytest.mark.parametrize("size", MICRO_BATCHES)
@pytest.mark.parametrize("share", OVERFITTED)
def test_overfitting_takes_the_first_steps_again_and_again(
    tiny_folder, short_rows, short_val_rows, tmp_path, planned, share, size
):
    batches, steps = OVERFITTED[share]
    data = {"micro_batch_size": size, "val_files": str(short_val_rows)}
    noting = train(tiny_folder, short_rows, tmp_path, data=data, overfit_batches=batches, max_steps=7)
    assert by_step(noting) == {step: planned[step % steps] for step in range(7)}
    if steps == 1:
        assert noting.losses[6] < noting.losses[1]
    validated = {int: batches * BATCH_SIZE, float: int(batches * 20)}[type(batches)]
    assert {len(rows) for rows in noting.validated.values()} == {min(validated, 20)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.6},
        {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
        {"overfit_batches": 2},
    ],
)
def test_a_limited_run_resumes_anywhere(tiny_folder, short_rows, tmp_path, arguments):
    module = {"lr_scheduler": lambda optimizer: L.pytorch.cli.instantiate_class((optimizer,), CONSTANT)}
    model = lambda: FireflyModule(str(tiny_folder), learning_rate=1e-2, **module)  # noqa: E731
    whole = train(tiny_folder, short_rows, tmp_path / "whole", max_steps=7, module=model(), **arguments)
    for stop, size in ((3, 2), (4, 1)):
        root = tmp_path / str(stop)
        train(tiny_folder, short_rows, root, max_steps=stop, module=model(), **arguments)
        resumed = train(
            tiny_folder, short_rows, root, max_steps=7, module=model(), ckpt_path=root / "checkpoints" / "last.ckpt",
            data={"micro_batch_size": size}, **arguments,
        )  # fmt: skip
        assert by_step(resumed) == {step: sorted(rows) for step, rows in whole.rows.items() if step >= stop}
        for step, loss in resumed.losses.items():
            assert loss == pytest.approx(whole.losses[step], rel=1e-5 if size != 2 else 1e-12)


CONSTANT = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}


def test_a_run_may_go_on_without_its_limit(tiny_folder, short_rows, tmp_path, planned):
    """Rows follow from the step alone."""
    train(tiny_folder, short_rows, tmp_path, max_steps=3, limit_train_batches=2)
    resumed = train(
        tiny_folder, short_rows, tmp_path, max_steps=7, ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )  # fmt: skip
    assert by_step(resumed) == {step: planned[step] for step in range(3, 7)}
    assert resumed.epoch == 2


@pytest.mark.parametrize("size", MICRO_BATCHES)
@pytest.mark.parametrize(("limit", "rows"), [(1, 8), (2, 16), (9, 20), (0.25, 5), (1.0, 20)])
def test_an_evaluation_takes_the_first_rows(tiny_folder, short_rows, short_val_rows, tmp_path, limit, rows, size):
    """As many whatever the micro-batches, and not the longest ones."""
    data = {"micro_batch_size": size, "val_files": str(short_val_rows)}
    noting = train(tiny_folder, short_rows, tmp_path, data=data, max_steps=1, val_check_interval=1,
                   limit_val_batches=limit)  # fmt: skip
    assert sorted(noting.validated[1]) == list(range(rows))


def test_no_rows_are_validated_where_there_are_to_be_none(tiny_folder, short_rows, short_val_rows, tmp_path):
    noting = train(tiny_folder, short_rows, tmp_path, data={"val_files": str(short_val_rows)}, max_steps=1,
                   val_check_interval=1, limit_val_batches=0)  # fmt: skip
    assert not noting.validated


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_tests_and_predictions_are_limited_alike(tiny_folder, short_val_rows, tmp_path, stage):
    data = make_data(tiny_folder, short_val_rows, test_files=str(short_val_rows))
    data.trainer = L.Trainer(**settings(**{f"limit_{stage}_batches": 2}, default_root_dir=tmp_path))
    data.prepare_data()
    data.setup(stage)
    loader = getattr(data, f"{stage}_dataloader")()
    assert sorted(row for batch in loader for row in batch["rows"].tolist()) == list(range(16))


def test_a_trainer_keeps_what_it_was_given(tiny_folder, short_rows, short_val_rows, tmp_path):
    """Its settings are in micro-batches while it runs; the next run has other ones."""
    trainer = L.Trainer(**settings(default_root_dir=tmp_path, max_epochs=1, limit_train_batches=4,
                                   val_check_interval=2, limit_val_batches=1))  # fmt: skip
    for size in (1, 2):
        data = make_data(tiny_folder, short_rows, micro_batch_size=size, val_files=str(short_val_rows))
        data.prepare_data()
        for _ in range(2):
            data.trainer = trainer
            data.setup("fit")
            assert trainer.accumulate_grad_batches == 8 // size
            assert trainer.val_check_interval == 2 * 8 // size
            assert len(data.train_dataloader()) == 4 * 8 // size
            assert len(data.val_dataloader()) == 8 // size
    trainer.val_check_interval = 3
    data.setup("fit")
    assert trainer.val_check_interval == 12


def test_validation_by_the_clock(tiny_folder, short_rows, short_val_rows, tmp_path, planned):
    data = {"val_files": str(short_val_rows)}
    noting = train(tiny_folder, short_rows, tmp_path, data=data, max_steps=3, val_check_interval={"microseconds": 1})
    assert by_step(noting) == {step: planned[step] for step in range(3)}
    assert set(noting.validated) >= {1, 2, 3}


REFUSED = {
    "no step": ({"limit_train_batches": 0}, "trainer.limit_train_batches 0 leaves nothing to train on"),
    "less than a step": (
        {"limit_train_batches": 0.1}, "trainer.limit_train_batches 0.1 of 5 steps of an epoch is less than one"),
    "less than a step to overfit": (
        {"overfit_batches": 0.1}, "trainer.overfit_batches 0.1 of 5 steps of an epoch is less than one"),
    "less than a row": ({"limit_val_batches": 0.01}, "trainer.limit_val_batches 0.01 of 20 rows is less than one"),
    "accumulation": ({"accumulate_grad_batches": 3}, "trainer.accumulate_grad_batches 3 disagrees"),
    "accumulation by epoch": (
        {"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler would change the rows"),
    "accumulation by later epochs": (
        {"callbacks": [GradientAccumulationScheduler({3: 4})]}, "GradientAccumulationScheduler would change the rows"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_at_the_start(tiny_folder, short_rows, short_val_rows, tmp_path, what):
    arguments, says = REFUSED[what]
    with pytest.raises(FireflyError) as raised:
        train(tiny_folder, short_rows, tmp_path, data={"val_files": str(short_val_rows)}, max_steps=2, **arguments)
    assert says in raised_line(raised)
    assert not (tmp_path / "checkpoints").exists()


def test_a_scheduler_that_accumulates_nothing_is_taken(tiny_folder, short_rows, tmp_path, planned):
    callbacks = [GradientAccumulationScheduler({0: 1})]
    noting = train(tiny_folder, short_rows, tmp_path, callbacks, data={"micro_batch_size": 8}, max_steps=2)
    assert by_step(noting) == {step: planned[step] for step in range(2)}
