"""A stopped run goes on as if it had not stopped."""

import json
import shutil

import pytest

from tests.helpers import fit, logged, one_line

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
        "tests.helpers.Killed",
        "--model.kill_step",
        kill_step,
        check=False,
        process=True,
    )
    assert killed.returncode == -9
    assert max(logged(tmp_path)) == kill_step - 1

    fit(dropout_model, rows_file, tmp_path, *args, "--ckpt_path", "last")

    resumed = logged(tmp_path, version=1)
    first = kill_step // every * every
    assert resumed == {step: loss for step, loss in losses.items() if step >= first}
    assert logged(tmp_path, "val_loss", version=1) == {s: loss for s, loss in val_losses.items() if s >= first}


def test_last_without_a_checkpoint_is_an_error(model_folder, rows_file, tmp_path):
    message = one_line(fit(model_folder, rows_file, tmp_path, "--ckpt_path", "last", check=False))
    assert message == f"{tmp_path}/checkpoints/last: no such checkpoint; check the path"


def test_other_data_is_refused(model_folder, rows_file, tmp_path):
    args = ["--data.batch_size", 8, "--trainer.max_steps", 2, "--model.warmup_steps", 1]
    fit(model_folder, rows_file, tmp_path, *args, "--checkpoint.every_n_steps", 1)
    args[3] = 4
    message = one_line(
        fit(model_folder, rows_file, tmp_path, *args, "--data.seed", 5, "--ckpt_path", "last", check=False)
    )
    assert "seed 0 → 5" in message
