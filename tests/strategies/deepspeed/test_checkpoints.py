"""ZeRO by DeepSpeed: stopped runs that go on, and checkpoints that are refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from firefly_lightning.checkpoints.own_form import files_of, finish_own
from firefly_lightning.files.manifest import entry_of
from tests.strategies.deepspeed.test_strategy import command, steps
from tests.support.choice import DIVIDED
from tests.support.damage import assert_damage_is_found
from tests.support.helpers import logged, one_line, run, run_ranks

PRECISIONS = {
    "zero1": "32-true",
    "zero2": "bf16-mixed",
    "zero3": "32-true",
    "zero2_offload": "32-true",
    "zero3_offload": "bf16-mixed",
}
STEPS = 6

KINDS = {"own": "false", "portable": "true"}
"""Of checkpoints: DeepSpeed's own, and those that any strategy reads."""

RESUMED = (
    [("own", "zero1"), ("own", "zero3"), ("portable", "zero3_offload")]
    if DIVIDED
    else [("own", strategy) for strategy in PRECISIONS] + [("portable", name) for name in ("zero2", "zero3_offload")]
)
"""How and under what; test_moving has portable ones of every stage."""


@pytest.fixture(scope="module")
def dropout_folder(odd_folder, tmp_path_factory) -> Path:
    """Dropout shows whether the random state is the same after resuming."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(odd_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout": 0.1, "attention_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def resumed(dropout_folder, rows_file, tmp_path_factory) -> Path:
    """By strategy: an uninterrupted run in `whole`; by kind, one that was stopped, resumed, and then validated."""
    folder = tmp_path_factory.mktemp("resumed")
    commands = []
    for strategy in dict.fromkeys(strategy for _, strategy in RESUMED):
        common = [
            "--data.val_fraction",
            0.25,
            "--data.micro_batch_size",
            2,
            "--trainer.precision",
            PRECISIONS[strategy],
        ]
        fit = [*common, "--trainer.gradient_clip_val", 0.1, *steps(STEPS)]
        stopping = {"model": "tests.support.helpers.Stopping"}
        commands.append(command("fit", strategy, dropout_folder, rows_file, folder / strategy / "whole", *fit))
        for kind in (kind for kind, saved_by in RESUMED if saved_by == strategy):
            parts, kept = folder / strategy / kind, ["--checkpoint.portable", KINDS[kind]]
            stop = [*kept, "--model.stop_step", 3]
            commands += [
                command("fit", strategy, dropout_folder, rows_file, parts, *fit, *stop, **stopping),
                command("fit", strategy, dropout_folder, rows_file, parts, *fit, *kept, "--ckpt_path", "last"),
                command("validate", strategy, dropout_folder, rows_file, parts, *common, "--ckpt_path", "last"),
            ]
    run_ranks(2, *commands)
    return folder


@pytest.mark.parametrize(("kind", "strategy"), RESUMED)
def test_a_stopped_run_goes_on_digit_for_digit(resumed, strategy, kind):
    whole, parts = (resumed / strategy / name for name in ("whole", kind))
    for name in ("train_loss", "grad_norm", "lr"):
        assert logged(parts, name) == logged(whole, name)
    assert sorted(logged(parts)) == list(range(STEPS))
    assert logged(parts, "val_loss") == logged(whole, "val_loss")


@pytest.mark.parametrize(("kind", "strategy"), RESUMED)
def test_a_checkpoint_is_validated(resumed, strategy, kind):
    parts = resumed / strategy / kind
    (expected,) = logged(parts, "val_loss").values()
    (found,) = logged(parts, "val_loss", version=1).values()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_a_checkpoint_of_another_stage_or_number_of_processes_is_refused(resumed, dropout_folder, rows_file, tmp_path):
    last = resumed / "zero1" / "own" / "checkpoints" / "last.ckpt"
    damaged = shutil.copytree(last, tmp_path / "damaged.ckpt")
    (shard,) = damaged.glob("checkpoint/*rank_1_*optim_states.pt")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    commands = []
    for strategy, given in (("zero3", last), ("zero1", damaged)):
        args = [tmp_path, *steps(STEPS), "--ckpt_path", given, "--trainer.devices", 1]
        name, *rest = command("fit", strategy, dropout_folder, rows_file, *args)
        commands.append([f"-{name}", *rest])
    text = run_ranks(1, *commands)
    assert "was saved otherwise (stage 1 → 3, processes 2 → 1); resume as it was saved" in text
    assert f"{shard}: damaged, its contents have changed; use an earlier checkpoint" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "missing", "code"])
def test_damaged_shards_are_refused_and_code_in_them_is_not_run(resumed, tmp_path, damage, listed):
    folder = tmp_path / "last.ckpt"
    shutil.copytree(resumed / "zero3" / "own" / "checkpoints" / "last.ckpt", folder)
    shard = folder / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    ran = tmp_path / "ran"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "missing":
        shard.unlink()
    else:
        torch.save(Touching(str(ran)), shard)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(shard, weights_only=True)
    if listed:  # as by somebody who knows the form
        finish_own(folder, {name: entry_of(folder / name) for name in files_of(folder)})
    export = run("firefly", "export", "--checkpoint", folder, "--out", tmp_path / "out", check=False)
    assert (f"{folder}: the shards cannot be read" if listed else f"{shard}: ") in one_line(export)
    assert not export.stdout
    assert not ran.exists()


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_changed_byte_of_any_file_is_found(resumed, tmp_path, strategy):
    assert_damage_is_found(resumed / strategy / "own" / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)
