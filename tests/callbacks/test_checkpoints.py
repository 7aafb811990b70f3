"""Which checkpoints a run keeps, and of which kind they are in a script that has a trainer of its own."""

import copy
from pathlib import Path

import pytest
from lightning import Trainer

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.callbacks.checkpoints import LastCheckpoint
from firefly_lightning.checkpoints.history import HISTORY
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import FireflyError
from tests.support.helpers import fit, forked, logged, raised_line, run

PLUGINS = {"none": None, "portable": AtomicCheckpointIO(), "own": AtomicCheckpointIO(portable=False)}

KINDS = {
    # What the plugin and the callback say, and what is saved.
    ("none", True): "folder",
    ("none", False): "own",
    ("portable", True): "folder",
    ("portable", False): "own",
    ("own", True): "own",
    ("own", False): "own",
}


def script(strategy: str, named: str, portable: bool, model: Path, rows: Path, root: Path) -> None:
    plugin = copy.copy(PLUGINS[named])
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=1,
        plugins=[plugin] if plugin else None,
        callbacks=[LastCheckpoint(portable=portable, dirpath=str(root))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FireflyModule(str(model), warmup_steps=1), FireflyDataModule(str(model), str(rows), batch_size=4))
    assert not plugin or vars(plugin) == vars(PLUGINS[named]), "the user's own plugin stays as it was"


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.parametrize(("named", "portable"), KINDS)
def test_checkpoints_are_portable_unless_plugin_or_callback_says_otherwise(
    strategy, named, portable, model_folder, rows_file, tmp_path
):
    process = forked(script, strategy, named, portable, model_folder, rows_file, tmp_path)
    process.join()
    assert process.exitcode == 0
    last = tmp_path / "last.ckpt"
    kind = "folder" if (last / "checkpoint.json").is_file() else "own"
    file_of_lightning = strategy == "auto" and named == "none"  # which has no other
    assert kind == ("own" if file_of_lightning else KINDS[named, portable])
    if strategy == "auto":
        assert last.is_file() == (kind == "own")


BEST = ["--data.batch_size", 8, "--data.micro_batch_size", 4, "--data.val_fraction", 0.25, "--model.warmup_steps", 1,
        "--model.learning_rate", 1e-3, "--trainer.check_val_every_n_epoch", "null"]  # fmt: skip


def bests(root: Path) -> list[str]:
    return sorted(path.name.split("-val")[0] for path in (root / "checkpoints").glob("best-*.ckpt"))


@pytest.mark.parametrize("top", [1, 2])
def test_a_resumed_run_keeps_the_best_of_the_whole_run_and_no_more(top, model_folder, rows_file, tmp_path):
    """The first part is saved at step 2, then validates at 3, so that its last checkpoint does not know of the best."""
    kept = ["--best_checkpoint.save_top_k", top, "--trainer.val_check_interval", 3, *BEST]
    killed = ["--model", "tests.support.helpers.Killed", "--model.kill_step", 3, "--checkpoint.every_n_steps", 2]
    fit(model_folder, rows_file, tmp_path, *kept, *killed, "--trainer.max_steps", 9, check=False, process=True)
    assert bests(tmp_path) == ["best-step=3"]
    fit(model_folder, rows_file, tmp_path, *kept, "--ckpt_path", "last", "--trainer.max_steps", 9)
    values = {step + 1: float(value) for step, value in logged(tmp_path, "val_loss").items()}
    assert sorted(values) == [3, 6, 9]
    assert bests(tmp_path) == sorted(f"best-step={step}" for step in sorted(values, key=values.get)[:top])


def test_a_run_of_its_own_in_the_same_folder_keeps_what_is_there(model_folder, rows_file, tmp_path):
    short = [*BEST, "--trainer.val_check_interval", 2]
    fit(model_folder, rows_file, tmp_path, *short, "--trainer.max_steps", 4)
    fit(model_folder, rows_file, tmp_path, *short, "--trainer.max_steps", 2, "--model.learning_rate", 0)
    second = tmp_path / "checkpoints" / "last-v1.ckpt"
    fit(model_folder, rows_file, tmp_path, *short, "--trainer.max_steps", 4, "--ckpt_path", second,
        "--model.learning_rate", 0)  # fmt: skip
    assert "best-step=4" in bests(tmp_path), "it is of another run, which this one must not touch"


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_checkpoint_has_the_validation_of_its_step(keep, model_folder, rows_file, tmp_path):
    """Both are due at the last step, which is saved before it is validated."""
    steps = ["--trainer.max_steps", 4, "--trainer.val_check_interval", 2, "--checkpoint.every_n_steps", 2]
    fit(model_folder, rows_file, tmp_path, *BEST, *steps, "--checkpoint.keep", keep)
    names = ["last.ckpt", *(["step=2.ckpt", "step=4.ckpt"] if keep == 2 else [])]
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith("best-"))
    assert found == names
    history = load_file(trainer_file(tmp_path / "checkpoints" / "last.ckpt"), "cpu")["callbacks"][HISTORY]
    assert history["figures_step"] == 4
    assert history["figures"]["val_loss"] == pytest.approx(float(logged(tmp_path, "val_loss")[3]), rel=1e-6)


def test_best_is_the_best_by_its_name(tmp_path):
    for name in ("2-val_loss=1.5000", "4-val_loss=0.9000", "6-val_loss=nan", "8-val_loss=1.1000-v1"):
        (tmp_path / f"best-step={name}.ckpt").touch()
    (tmp_path / "last.ckpt").touch()
    assert find_checkpoint(str(tmp_path / "best")).name == "best-step=4-val_loss=0.9000.ckpt"
    assert find_checkpoint(str(tmp_path / "best"), "max").name == "best-step=2-val_loss=1.5000.ckpt"
    with pytest.raises(FireflyError, match="there is no best") as raised:
        find_checkpoint(str(tmp_path / "nowhere" / "best"))
    raised_line(raised)


def test_best_works_in_every_command(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *BEST, "--trainer.val_check_interval", 2, "--trainer.max_steps", 3)
    common = ["--model.path", model_folder, "--data.val_files", rows_file, "--trainer.accelerator", "cpu",
              "--trainer.default_root_dir", tmp_path, "--ckpt_path", "best"]  # fmt: skip
    run("firefly-fit", "validate", *common)
    fit(model_folder, rows_file, tmp_path, *BEST, "--trainer.max_steps", 4, "--ckpt_path", "best")
    assert sorted(logged(tmp_path, version=2)) == [2, 3], "it goes on after the second step"
    out = tmp_path / "out"
    shown = run("firefly", "export", "--checkpoint", tmp_path / "checkpoints" / "best", "--out", out).stdout
    assert shown.splitlines()[-1].endswith(f"firefly chat --model {out}")
    assert (out / "config.json").is_file()
