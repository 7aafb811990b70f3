"""A stopped run goes on as if it had not stopped."""

import itertools
import json
import shutil

import pytest

from tests.support.choice import DIVIDED
from tests.support.helpers import fit, logged, one_line

ARGS = [
    *(
        "--data.batch_size",
        8,
        "--data.micro_batch_size",
        4,
        "--data.val_fraction",
        0.25,
    ),  # 45 rows: 6 steps, the last short
    *("--model.learning_rate", 1e-3, "--model.warmup_steps", 2, "--trainer.max_steps", 14),
    *("--trainer.val_check_interval", 4, "--trainer.check_val_every_n_epoch", "null"),
]


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory, model_folder):
    """Dropout shows whether the random state is the same after resuming."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["hidden_dropout"] = config["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dropout_model, rows_file):
    root = tmp_path_factory.mktemp("uninterrupted")
    fit(dropout_model, rows_file, root, *ARGS)
    losses = logged(root)
    assert sorted(losses) == list(range(14))
    return losses, logged(root, "val_loss")


@pytest.mark.parametrize(
    ("every", "kill_step"),
    [(3, 10), (6, 7), (4, 5)],
    ids=["mid-epoch", "checkpoint at the end of an epoch", "checkpoint at a validation"],
)
def test_killed_run_resumes_digit_for_digit(dropout_model, rows_file, tmp_path, uninterrupted, every, kill_step):
    losses, val_losses = uninterrupted
    args = [*ARGS, "--checkpoint.every_n_steps", every]
    killed = fit(
        dropout_model,
        rows_file,
        tmp_path,
        *args,
        "--model",
        "tests.support.helpers.Killed",
        "--model.kill_step",
        kill_step,
        check=False,
        process=True,
    )
    assert killed.returncode == -9
    assert max(logged(tmp_path)) == kill_step - 1

    fit(dropout_model, rows_file, tmp_path, *args, "--ckpt_path", "last")

    assert logged(tmp_path) == losses
    assert logged(tmp_path, "val_loss") == val_losses


STOPS = {
    "max_steps in the middle of an epoch": ["--trainer.max_steps", 8, "--checkpoint.every_n_steps", 3],
    "max_steps at the end of an epoch": ["--trainer.max_steps", 6, "--checkpoint.every_n_steps", 4],
    "max_steps at a validation": ["--trainer.max_steps", 4, "--checkpoint.every_n_steps", 3],
    "max_epochs": ["--trainer.max_steps", -1, "--trainer.max_epochs", 1, "--checkpoint.every_n_steps", 4],
    "in the middle of a step": ["--model", "tests.support.helpers.Stopping", "--model.stop_step", 7],
}


@pytest.fixture(scope="module")
def constant(tmp_path_factory, dropout_model, rows_file):
    """An uninterrupted run whose learning rate does not depend on its length."""
    root = tmp_path_factory.mktemp("constant")
    fit(dropout_model, rows_file, root, *ARGS, *CONSTANT)
    return logged(root), logged(root, "val_loss")


CONSTANT = [
    *("--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor", 1),
    *("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 1e-3),
]


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_stopped_run_goes_on_digit_for_digit(dropout_model, rows_file, tmp_path, constant, stop):
    losses, val_losses = constant
    fit(dropout_model, rows_file, tmp_path, *ARGS, *CONSTANT, *stop)
    done = max(logged(tmp_path)) + 1
    assert done < 14
    fit(dropout_model, rows_file, tmp_path, *ARGS, *CONSTANT, "--ckpt_path", "last")
    assert logged(tmp_path) == losses
    assert logged(tmp_path, "val_loss") == val_losses


ENDS = {6: "at the end of an epoch", 8: "within an epoch"}


@pytest.mark.parametrize(
    ("workers", "kill_step"),
    [
        pytest.param(workers, step, id=f"{workers}-{ENDS[step]}")
        for workers, step in (zip((0, 2), ENDS, strict=True) if DIVIDED else itertools.product((0, 2), ENDS))
    ],
)
def test_a_run_counted_in_epochs_resumes(dropout_model, rows_file, tmp_path, in_epochs, kill_step, workers):
    """Its schedule asks for the number of batches before Lightning knows the step to resume at."""
    losses, val_losses = in_epochs
    args = [*EPOCHS, "--checkpoint.every_n_steps", 3, "--data.num_workers", workers]
    kill = ["--model", "tests.support.helpers.Killed", "--model.kill_step", kill_step]
    fit(dropout_model, rows_file, tmp_path, *args, *kill, check=False, process=True)
    fit(dropout_model, rows_file, tmp_path, *args, "--ckpt_path", "last")
    assert logged(tmp_path) == losses
    assert logged(tmp_path, "val_loss") == val_losses


EPOCHS = [
    *("--data.batch_size", 8, "--data.micro_batch_size", 4, "--data.val_fraction", 0.25),
    *("--model.learning_rate", 1e-3, "--model.warmup_steps", 2, "--trainer.max_epochs", 3),
]


@pytest.fixture(scope="module")
def in_epochs(tmp_path_factory, dropout_model, rows_file):
    root = tmp_path_factory.mktemp("epochs")
    fit(dropout_model, rows_file, root, *EPOCHS)
    assert sorted(logged(root, "val_loss")) == [5, 11, 17]
    return logged(root), logged(root, "val_loss")


def test_rows_of_another_step_are_never_trained_on(dropout_model, rows_file, tmp_path):
    """A data module of another name does not find its state; its rows must not go to the wrong step."""
    args = [*EPOCHS, "--trainer.max_epochs", 1]
    fit(dropout_model, rows_file, tmp_path, *args)
    args[-1] = 2
    other = ["--data", "tests.support.helpers.RenamedData"]
    message = one_line(fit(dropout_model, rows_file, tmp_path, *args, *other, "--ckpt_path", "last", check=False))
    assert message.startswith("step 6 was given the rows of step 0")


def test_the_best_checkpoint_resumes_too(dropout_model, rows_file, tmp_path, constant):
    losses, val_losses = constant
    fit(dropout_model, rows_file, tmp_path, *ARGS, *CONSTANT, "--trainer.max_steps", 10)
    (best,) = (tmp_path / "checkpoints").glob("best-*.ckpt")
    first = int(best.name.split("step=")[1].split("-")[0])
    assert first in (4, 8)
    fit(dropout_model, rows_file, tmp_path, *ARGS, *CONSTANT, "--ckpt_path", best)
    assert logged(tmp_path, version=1) == {step: loss for step, loss in losses.items() if step >= first}
    assert logged(tmp_path, "val_loss", version=1) == {s: loss for s, loss in val_losses.items() if s >= first}


def test_a_resumed_run_may_take_other_micro_batches(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path / "whole", *ARGS, *CONSTANT)
    fit(model_folder, rows_file, tmp_path / "moved", *ARGS, *CONSTANT, "--trainer.max_steps", 8)
    fit(
        model_folder,
        rows_file,
        tmp_path / "moved",
        *ARGS,
        *CONSTANT,
        "--data.micro_batch_size",
        1,
        "--ckpt_path",
        "last",
    )
    whole, moved = logged(tmp_path / "whole"), logged(tmp_path / "moved")
    assert sorted(moved) == list(range(14))
    assert all(float(moved[step]) == pytest.approx(float(whole[step]), rel=1e-5) for step in moved)


def test_last_without_a_checkpoint_is_an_error(model_folder, rows_file, tmp_path):
    message = one_line(fit(model_folder, rows_file, tmp_path, "--ckpt_path", "last", check=False))
    assert message == f"{tmp_path}/checkpoints/last: no such checkpoint yet; to begin anew, let ckpt_path be auto"


def test_other_data_is_refused(model_folder, rows_file, tmp_path):
    args = ["--data.batch_size", 8, "--trainer.max_steps", 2, "--model.warmup_steps", 1]
    fit(model_folder, rows_file, tmp_path, *args, "--checkpoint.every_n_steps", 1)
    args[3] = 4
    message = one_line(
        fit(model_folder, rows_file, tmp_path, *args, "--data.seed", 5, "--ckpt_path", "last", check=False)
    )
    assert "seed 0 → 5" in message
