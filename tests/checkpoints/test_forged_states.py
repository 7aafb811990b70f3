"""Checkpoints whose digests are right and whose inner states are not, as somebody may forge them: one line says so."""

import contextlib
import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import checkpoint_connector

from firefly_lightning import AtomicCheckpointIO, FireflyModule
from firefly_lightning.callbacks.catch_up import CatchUp
from firefly_lightning.callbacks.checkpoints import BestCheckpoint
from firefly_lightning.checkpoints.torch_file import load_file, save_file
from firefly_lightning.cli_errors import checkpoint_errors
from firefly_lightning.errors import FireflyError
from firefly_lightning.export import export
from tests.support.choice import DIVIDED
from tests.support.helpers import fit, one_line, raised_line
from tests.support.small_runs import make_data, settings, short_rows, train  # noqa: F401  (fixtures)

OTHERS = [None, 3, "x", [], ["x"], [None], {}, {"x": 1}, [{}], {"state": 3}]

NESTED = [
    ("lr_schedulers",),
    ("lr_schedulers", 0),
    ("lr_schedulers", 0, "last_epoch"),
    ("lr_schedulers", 0, "base_lrs"),
    ("lr_schedulers", 0, "_last_lr"),
    ("lr_schedulers", 0, "lr_lambdas"),
    ("optimizer_states",),
    ("optimizer_states", 0),
    ("optimizer_states", 0, "state"),
    ("optimizer_states", 0, "state", 0),
    ("optimizer_states", 0, "state", 0, "exp_avg"),
    ("optimizer_states", 0, "param_groups"),
    ("optimizer_states", 0, "param_groups", 0),
    ("optimizer_states", 0, "param_groups", 0, "params"),
    ("loops", "fit_loop"),
    ("loops", "fit_loop", "state_dict"),
    ("loops", "fit_loop", "epoch_progress"),
    ("loops", "fit_loop", "epoch_loop.manual_optimization.optim_step_progress"),
    ("callbacks",),
    ("callbacks", "BestCheckpoint"),
    ("callbacks", "BestCheckpoint", "best_k_models"),
    ("FireflyDataModule", "step"),
    ("FireflyDataModule", "plan"),
    ("changed_settings",),
    ("changed_settings", 0),
    ("last_step",),
    ("last_step", "train_loss"),
]


def run(model: Path, rows: Path, root: Path, resumed: Path | None = None, portable: bool = False):
    callbacks = [BestCheckpoint("train_loss", dirpath=str(root / "checkpoints")), CatchUp()]
    with checkpoint_errors(Path(checkpoint_connector.__file__)):
        train(
            model, rows, root, callbacks, resumed, plugins=[AtomicCheckpointIO(portable)], max_steps=4 if resumed else 3
        )
    return root / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def saved(tiny_folder, short_rows, tmp_path_factory) -> Path:  # noqa: F811
    return run(tiny_folder, short_rows, tmp_path_factory.mktemp("saved"))


def put(contents: dict, place: tuple, value) -> dict:
    """A copy of the contents with another value in a place; of a callback's key its beginning is enough."""
    holder = changed = copy.deepcopy(contents)
    for number, name in enumerate(place, 1):
        key = next(key for key in holder if key.startswith(name)) if isinstance(name, str) else name
        if number == len(place):
            holder[key] = value
        holder = holder[key]
    return changed


@pytest.mark.parametrize("place", NESTED[:: 4 if DIVIDED else 1], ids=lambda place: ".".join(map(str, place)))
def test_any_value_in_an_inner_state_is_taken_or_refused_in_a_line(saved, place, tiny_folder, short_rows, tmp_path):  # noqa: F811
    for value in OTHERS[:: 4 if DIVIDED else 1]:
        forged = forged_file(tmp_path, load_file(saved, "cpu"), place, value)
        with contextlib.suppress(FireflyError):  # nothing else
            run(tiny_folder, short_rows, tmp_path / "run", forged)


@pytest.mark.parametrize("shape", [(3,), (16, 328), (328, 17), (329, 16), (328, 16, 1)], ids=str)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_states_of_other_shapes_are_refused_before_a_step(saved, key, shape, tiny_folder, short_rows, tmp_path):  # noqa: F811
    forged = forged_file(tmp_path, load_file(saved, "cpu"), ("optimizer_states", 0, "state", 0, key), torch.ones(shape))
    with pytest.raises(FireflyError, match=f"keeps {key} of .*word_embeddings.weight with the sizes") as raised:
        run(tiny_folder, short_rows, tmp_path / "run", forged)
    raised_line(raised)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("lr_schedulers",), [{}], r"forged\.ckpt: its lr_schedulers is list, not schedules' states"),
        (("lr_schedulers", 0, "lr_lambdas"), 3, r"forged\.ckpt: could not restore lr schedulers from it \(TypeError"),
        (("optimizer_states", 0, "state", 0), {"x": torch.ones(328, 16)}, "the checkpoint's optimizer keeps x of a w"),
        (("loops", "fit_loop", "state_dict"), [3], r"forged\.ckpt: could not restore loops from it"),
        (
            ("callbacks", "BestCheckpoint"),
            {"dirpath": 3},
            r"forged\.ckpt: could not restore callbacks from it \(KeyError",
        ),
    ],
)
def test_the_line_says_which_state_is_wrong(saved, place, value, message, tiny_folder, short_rows, tmp_path):  # noqa: F811
    forged = forged_file(tmp_path, load_file(saved, "cpu"), place, value)
    with pytest.raises(FireflyError, match=message) as raised:
        run(tiny_folder, short_rows, tmp_path / "run", forged)
    raised_line(raised)


def test_only_the_command_makes_a_line_of_what_restoring_raises(saved, tiny_folder, short_rows, tmp_path):  # noqa: F811
    """Other code of Lightning's keeps its traceback, and so does a checkpoint in a user's own script."""
    with pytest.raises(KeyError), checkpoint_errors(Path(checkpoint_connector.__file__)):
        raise KeyError("elsewhere")
    forged = forged_file(tmp_path, load_file(saved, "cpu"), ("loops", "fit_loop", "state_dict"), [3])
    args = ["--trainer.max_steps", 4, "--data.batch_size", 8, "--data.micro_batch_size", 2]
    line = one_line(fit(tiny_folder, short_rows, tmp_path, "--ckpt_path", forged, *args, check=False))
    assert line.startswith(f"{forged}: could not restore loops from it (")


def forged_file(folder: Path, contents: dict, place: tuple, value) -> Path:
    path = folder / "forged.ckpt"
    with path.open("w+b") as file:
        save_file(put(contents, place, value), file)
    return path


@pytest.mark.parametrize("portable", [True, False])
def test_no_run_is_resumed_from_weights_alone(portable, tiny_folder, short_rows, tmp_path):  # noqa: F811
    """What is said works: the weights can be exported, validated and trained anew."""
    kept = ModelCheckpoint(tmp_path, "weights", save_weights_only=True, every_n_train_steps=2)
    plugins = [AtomicCheckpointIO(portable)]
    train(tiny_folder, short_rows, tmp_path / "first", [kept], plugins=plugins, max_steps=2)
    weights = tmp_path / "weights.ckpt"
    assert weights.is_dir() == portable
    with pytest.raises(FireflyError, match=r"holds weights alone .* write a folder with firefly export") as raised:
        train(tiny_folder, short_rows, tmp_path / "second", ckpt_path=weights, plugins=plugins, max_steps=4)
    assert raised_line(raised).startswith(f"{weights}: ")
    export(str(weights), str(tmp_path / "model"))
    train(tmp_path / "model", short_rows, tmp_path / "third", max_steps=1)
    trainer, data = L.Trainer(**settings()), make_data(tiny_folder, short_rows, val_files=str(short_rows))
    assert trainer.validate(FireflyModule(str(tiny_folder)), data, ckpt_path=weights)[0]["val_loss"] > 0
