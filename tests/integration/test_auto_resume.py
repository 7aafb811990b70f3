"""A run that is started again by the same command, however it ended, leaves what an undisturbed run leaves."""

import csv
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as OfTheBoard

from firefly_lightning.checkpoints.history import HISTORY
from firefly_lightning.checkpoints.newest import check_whole
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from tests.support.helpers import fit, forked, one_line, run_ranks
from tests.support.ranks import bare, run_rank

STEPS = 14
RUN = [
    *("--data.batch_size", 8, "--data.micro_batch_size", 4, "--data.val_fraction", 0.25, "--trainer.max_steps", STEPS),
    *("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", 3),
    # Of a rate that does not depend on how long the run is.
    *("--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor", 1),
    *("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 1e-3),
]
ONE = ["--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.enable_progress_bar", "false"]
AUTO = ["--ckpt_path", "auto"]
OF_THE_MOMENT = {"target_tokens_per_second", "data_wait", "memory_gb", "mfu"}
"""Columns that tell how fast a run was."""


def rows_of(root: Path) -> list[dict[str, str]]:
    """All rows of the only ``metrics.csv`` of a run, digit for digit, without what differs from run to run."""
    (file,) = (root / "lightning_logs").glob("*/metrics*.csv")
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [{name: value for name, value in row.items() if name not in OF_THE_MOMENT} for row in rows]


def check_board(root: Path, rows: list[dict[str, str]]) -> None:
    """TensorBoard shows each value of the rows once, whichever of its readers is asked."""
    (folder,) = (root / "lightning_logs").iterdir()
    for events in (EventAccumulator(str(folder), {"scalars": 0}), OfTheBoard(str(folder), {"tensors": 0})):
        events.Reload()
        for name in ("train_loss", "lr", "val_loss", "epoch"):
            found = events.Scalars(name) if isinstance(events, EventAccumulator) else events.Tensors(name)
            expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            assert sorted(event.step for event in found) == sorted(step for step, _ in expected), name
            if isinstance(events, EventAccumulator):
                values = [event.value for event in sorted(found, key=lambda event: event.step)]
                assert values == pytest.approx([value for _, value in sorted(expected)], rel=1e-6), name


def history_of(root: Path) -> dict:
    return load_file(trainer_file(root / "checkpoints" / "last.ckpt"), "cpu")["callbacks"][HISTORY]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder, rows_file) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    fit(model_folder, rows_file, root, *RUN, *AUTO)
    rows = rows_of(root)
    assert [int(row["step"]) for row in rows if row["train_loss"]] == list(range(STEPS))
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [2, 5, 8, 11]
    check_board(root, rows)
    return root


def check_same(root: Path, undisturbed: Path) -> None:
    """Figures are those of an undisturbed run: rows in their order and to the digit, events, and those of the card."""
    assert rows_of(root) == rows_of(undisturbed)
    check_board(root, rows_of(undisturbed))
    own, other = history_of(root), history_of(undisturbed)
    for name in ("curves", "figures", "figures_step", "figures_rows", "kinds"):
        assert own[name] == other[name], name
    best = [sorted(path.name for path in (one / "checkpoints").glob("best-*")) for one in (root, undisturbed)]
    assert best[0] == best[1]


def test_the_first_start_begins_anew_and_says_so(model_folder, rows_file, tmp_path, caplog):
    caplog.set_level("INFO")
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 1)
    assert f"no checkpoint in {tmp_path}/checkpoints yet, so the run begins anew" in caplog.text
    assert "goes on" not in caplog.text
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 2)
    assert f"goes on from {tmp_path}/checkpoints/last.ckpt, saved after 1 steps" in caplog.text


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_is_killed_at_random_moments(keep, undisturbed, model_folder, rows_file, tmp_path):
    """It saves every other step; each start is killed some moments after it has made a step."""
    chance = random.Random(keep)
    command = ["--model.path", model_folder, "--data.train_files", rows_file, "--trainer.default_root_dir", tmp_path,
               *ONE, *RUN, *AUTO, "--checkpoint.every_n_steps", 2, "--checkpoint.keep", keep]  # fmt: skip
    arguments = ["firefly-fit", "fit", *map(str, command)]
    for _ in range(4):
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = forked(run_rank, [arguments], own, tmp_path / "out.txt", tmp_path / "err.txt", tmp_path)
        before = logged_bytes(tmp_path)
        while process.is_alive() and (logged_bytes(tmp_path) == before or not find(tmp_path, "checkpoints/last.ckpt")):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.25))
        process.kill()
        process.join()
        let_the_second_pass(tmp_path)
    fit(model_folder, rows_file, tmp_path, *command[8:])
    check_same(tmp_path, undisturbed)
    if keep > 1:
        named = sorted(path.name for path in (tmp_path / "checkpoints").glob("step=*"))
        assert named == ["step=12.ckpt", "step=14.ckpt"]


def let_the_second_pass(root: Path) -> None:
    """TensorBoard reads files in the order of their names: of the second of their making, then of the process's number.

    A command takes longer to start. A fork does not, and its number may be the larger, or have other digits.
    """
    while int(time.time()) in {int(file.name.split(".")[3]) for file in find(root, "lightning_logs/*/events.*")}:
        time.sleep(0.01)


def logged_bytes(root: Path) -> int:
    return sum(file.stat().st_size for file in find(root, "lightning_logs/*/metrics.csv"))


def find(root: Path, pattern: str) -> list[Path]:
    return [*root.glob(pattern)]


def die(*arguments: object, **named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = {
    "saved, not logged": ("lightning.pytorch.loggers.TensorBoardLogger.log_metrics", 6),
    "in TensorBoard, not in metrics.csv": ("firefly_lightning.callbacks.metrics_file.MetricsFile.log_metrics", 6),
    "in a validation": ("firefly_lightning.module.FireflyModule.validation_step", 6),
    "validated, not logged": ("lightning.pytorch.loggers.TensorBoardLogger.log_metrics", 6.5),
    "the validation in TensorBoard only": ("firefly_lightning.callbacks.metrics_file.MetricsFile.log_metrics", 6.5),
    "validated and logged, but not the best yet": (
        "firefly_lightning.callbacks.checkpoints.BestCheckpoint.on_validation_end", 6),
    "the last step is saved, not logged": ("firefly_lightning.callbacks.metrics_file.MetricsFile.log_metrics", STEPS),
}  # fmt: skip
"""What is called when the run is killed, and after how many steps; half a step more is the second such call."""


def killed_at(moment: str, command: list[str], folder: Path) -> None:
    """Runs a command in this process, and kills it when a function is called."""
    from unittest import mock

    from firefly_lightning.callbacks.catch_up import CatchUp

    name, after = MOMENTS[moment]
    path, _, attribute = name.rpartition(".")
    module, _, of = path.rpartition(".")
    owner = getattr(__import__(module, fromlist=[of]), of)
    original, steps, calls = getattr(owner, attribute), [], []
    saved = CatchUp.on_save_checkpoint

    def note(self, trainer, *arguments):
        steps.append(trainer.global_step)
        return saved(self, trainer, *arguments)

    def called(*arguments, **named):
        if steps and steps[-1] == int(after):
            calls.append(1)
            if len(calls) > (after != int(after)):
                die()
        return original(*arguments, **named)

    with mock.patch.object(CatchUp, "on_save_checkpoint", note), mock.patch.object(owner, attribute, called):
        run_rank([command], {"OMP_NUM_THREADS": "1"}, folder / "out.txt", folder / "err.txt", folder)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_between_a_step_and_its_figures(moment, undisturbed, model_folder, rows_file, tmp_path):
    """Every step is saved, so that what is killed has been saved, but not been written down everywhere."""
    own = ["--model.path", model_folder, "--data.train_files", rows_file, "--trainer.default_root_dir", tmp_path, *ONE]
    every = ["--checkpoint.every_n_steps", 1]
    command = ["firefly-fit", "fit", *map(str, bare([*own, *RUN, *AUTO, *every]))]
    process = forked(killed_at, moment, command, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "err.txt").read_text()
    let_the_second_pass(tmp_path)
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, *every)
    check_same(tmp_path, undisturbed)


def test_two_processes_go_on_together(model_folder, rows_file, tmp_path):
    own = ["--model.path", model_folder, "--data.train_files", rows_file]
    ranks = [*ONE, "--trainer.strategy", "ddp", "--trainer.devices", 2, *own]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["firefly-fit", "fit", *ranks, *RUN, *AUTO]
    killed = ["--model", "tests.support.helpers.Stopping", "--model.stop_step"]
    run_ranks(
        2,
        [*common, "--trainer.default_root_dir", whole],
        [*common, "--trainer.default_root_dir", parts, "--trainer.max_steps", 5, "--checkpoint.every_n_steps", 2],
        [*common, "--trainer.default_root_dir", parts, *killed, 9, "--checkpoint.every_n_steps", 2],
        [*common, "--trainer.default_root_dir", parts, "--checkpoint.every_n_steps", 2],
    )
    check_same(parts, whole)


def test_a_finished_run_that_is_started_again_is_left_as_it_is(undisturbed, model_folder, rows_file, tmp_path):
    root = tmp_path
    fit(model_folder, rows_file, root, *RUN, *AUTO)
    times = {file: file.stat().st_mtime_ns for file in (root / "checkpoints").rglob("*")}
    configuration = (root / "lightning_logs" / "version_0" / "config.yaml").read_text()
    fit(model_folder, rows_file, root, *RUN, *AUTO)
    check_same(root, undisturbed)
    assert {file: file.stat().st_mtime_ns for file in (root / "checkpoints").rglob("*")} == times
    assert (root / "lightning_logs" / "version_0" / "config.yaml").read_text() == configuration


def test_a_damaged_checkpoint_costs_its_steps_only(undisturbed, model_folder, rows_file, tmp_path, caplog):
    own = ["--checkpoint.keep", 2, "--checkpoint.every_n_steps", 4]
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, *own, "--trainer.max_steps", 10)
    newest = tmp_path / "checkpoints" / "last.ckpt" / "optimizer-0-0.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    caplog.set_level("INFO")
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, *own)
    assert f"passes over {newest}: damaged, its contents have changed" in caplog.text
    check_same(tmp_path, undisturbed)


def test_a_refused_start_changes_nothing(model_folder, rows_file, tmp_path):
    """Other data in the folder are no damage: to pass them over would begin another run in silence."""
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 5, "--checkpoint.every_n_steps", 2)
    (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open("a").write("cut")
    before = contents(tmp_path)
    for other, words in ((["--data.seed", 5], "seed 0 → 5"), (["--model.optimizer", "torch.optim.SGD"], "optimizer")):
        message = one_line(fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, *other, check=False))
        assert words in message
        assert contents(tmp_path) == before


def contents(root: Path) -> dict[Path, bytes]:
    """Files of a run, without events, of which each start has a file of its own."""
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file() and "tfevents" not in file.name}


def test_a_run_from_an_earlier_checkpoint_has_figures_of_its_own(model_folder, rows_file, tmp_path):
    """A path is a wish to go back, and leaves the figures of the other part where they are; auto then follows it."""
    own = ["--checkpoint.keep", 3, "--checkpoint.every_n_steps", 3, "--trainer.val_check_interval", 100]
    fit(model_folder, rows_file, tmp_path, *RUN, *own, "--trainer.max_steps", 8)
    logs = tmp_path / "lightning_logs"
    trunk = (logs / "version_0" / "metrics.csv").read_bytes()
    earlier = tmp_path / "checkpoints" / "step=3.ckpt"
    fit(model_folder, rows_file, tmp_path, *RUN, *own, "--trainer.max_steps", 5, "--ckpt_path", earlier)
    fit(model_folder, rows_file, tmp_path, *RUN, *own, "--trainer.max_steps", 6, *AUTO)
    assert (logs / "version_0" / "metrics.csv").read_bytes() == trunk
    with (logs / "version_1" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]] == [3, 4, 5]
    assert sorted(path.name for path in logs.iterdir()) == ["version_0", "version_1"]


def test_changed_settings_are_kept_beside_the_earlier_ones(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 2)
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 2)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert not list(folder.glob("config-*"))
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 3, "--data.num_workers", 1)
    assert "max_steps: 3" in (folder / "config.yaml").read_text()
    assert "ckpt_path: auto" in (folder / "config.yaml").read_text()
    assert "max_steps: 2" in (folder / "config-0.yaml").read_text()


def test_a_copied_checkpoint_does_not_take_the_figures_of_another_run(model_folder, rows_file, tmp_path):
    """Versions of two folders have the same numbers."""
    fit(model_folder, rows_file, tmp_path / "a", *RUN, "--trainer.max_steps", 4)
    fit(model_folder, rows_file, tmp_path / "b", *RUN, "--trainer.max_steps", 6, "--model.optimizer.lr", 1e-4)
    figures = (tmp_path / "b" / "lightning_logs" / "version_0" / "metrics.csv").read_bytes()
    (tmp_path / "b" / "checkpoints").rename(tmp_path / "b" / "own")
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "b" / "checkpoints")
    fit(model_folder, rows_file, tmp_path / "b", *RUN, *AUTO, "--trainer.max_steps", 5)
    assert (tmp_path / "b" / "lightning_logs" / "version_0" / "metrics.csv").read_bytes() == figures
    assert (tmp_path / "b" / "lightning_logs" / "version_1" / "metrics.csv").is_file()


def test_yaml_may_say_auto(model_folder, rows_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("ckpt_path: auto\n")
    for steps in (1, 2):
        fit(model_folder, rows_file, tmp_path, *RUN, "--config", config, "--trainer.max_steps", steps)
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [0, 1]


def test_nothing_whole_is_said_and_nothing_is_begun(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *RUN, "--trainer.max_steps", 1)
    (tmp_path / "checkpoints" / "last.ckpt" / "trainer.ckpt").write_bytes(b"")
    message = one_line(fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, check=False))
    assert "no checkpoint of the run is whole" in message
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 1


def test_processes_pass_over_a_damaged_part_of_an_engines_own_form_together(model_folder, rows_file, tmp_path):
    """Each of the parts is of one process, and all processes have to choose the same checkpoint."""
    parts = {"class_path": "firefly_lightning.strategies.FSDP2Strategy"}
    parts["init_args"] = {"save_distributed_checkpoint": True}
    own = ["--trainer.strategy", json.dumps(parts), "--trainer.devices", 2]
    own += ["--checkpoint.portable", "false", "--checkpoint.keep", 2]
    common = ["--model.path", model_folder, "--data.train_files", rows_file, "--trainer.default_root_dir", tmp_path]
    command = ["firefly-fit", "fit", *ONE, *RUN, *AUTO, *common, *own, "--checkpoint.every_n_steps", 2]
    run_ranks(2, [*command, "--trainer.max_steps", 5])
    first = rows_of(tmp_path)
    part = tmp_path / "checkpoints" / "last.ckpt" / "rank-1.pt"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    said = run_ranks(2, [*command, "--trainer.max_steps", 6])
    assert said.count(f"passes over {part}: damaged") == 1, "one process says so for all"
    assert "step=4.ckpt, saved after 4 steps" in said
    again = rows_of(tmp_path)
    assert again[: len(first)] == first
    assert [int(row["step"]) for row in again if row["train_loss"]] == [*range(6)]


def test_an_adapter_goes_on_in_a_folder_of_its_own_choice(model_folder, rows_file, tmp_path):
    own = ["--model.adapter", "lora", "--checkpoint.dirpath", tmp_path / "elsewhere", "--checkpoint.every_n_steps", 2]
    for root, ends in ((tmp_path / "undisturbed", [6]), (tmp_path / "stopped", [3, 6])):
        own[3] = root / "elsewhere"
        for end in ends:
            fit(model_folder, rows_file, root, *RUN, *AUTO, *own, "--trainer.max_steps", end)
    first, second = (rows_of(tmp_path / name) for name in ("undisturbed", "stopped"))
    assert [row for row in second if row["train_loss"]] == [row for row in first if row["train_loss"]]
    assert (tmp_path / "stopped" / "elsewhere" / "last.ckpt").is_dir()


def test_a_checkpoint_of_another_model_is_no_start(model_folder, odd_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, "--trainer.max_steps", 2)
    before = contents(tmp_path)
    message = one_line(fit(odd_folder, rows_file, tmp_path, *RUN, *AUTO, check=False))
    assert "vocab" in message or "tokenizer" in message, message
    assert contents(tmp_path) == before


def test_a_run_is_not_gone_on_with_while_it_trains(model_folder, rows_file, tmp_path):
    """As where a queue starts it again too early; it is left alone, and can be gone on with once it has ended."""
    slow = ["--model", "benchmarks.elastic_run.Recorded", "--model.pause", 0.5, "--checkpoint.every_n_steps", 5]
    command = ["--model.path", model_folder, "--data.train_files", rows_file, "--trainer.default_root_dir", tmp_path,
               *ONE, *RUN, *AUTO]  # fmt: skip
    arguments = ["firefly-fit", "fit", *map(str, [*slow, *command])]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    first = forked(run_rank, [arguments], own, tmp_path / "out.txt", tmp_path / "err.txt", tmp_path)
    while not (logged_bytes(tmp_path) and find(tmp_path, "checkpoints/last.ckpt")):
        assert first.is_alive()
        time.sleep(0.01)
    second = fit(model_folder, rows_file, tmp_path, *slow, *RUN, *AUTO, check=False)
    assert "lightning_logs/version_0: another run writes its figures there at this moment; wait" in one_line(second)
    first.join()
    assert first.exitcode == 0
    assert [int(row["step"]) for row in rows_of(tmp_path) if row["train_loss"]] == [*range(STEPS)]
    assert not find(tmp_path, "lightning_logs/*/.lock")
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO)


def test_a_damaged_checkpoint_gives_its_name_to_the_step_made_again(model_folder, rows_file, tmp_path):
    own = ["--checkpoint.keep", 2, "--checkpoint.every_n_steps", 2, "--trainer.val_check_interval", 100]
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, *own, "--trainer.max_steps", 6)
    file = tmp_path / "checkpoints" / "step=6.ckpt" / "model-0-0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    fit(model_folder, rows_file, tmp_path, *RUN, *AUTO, *own, "--trainer.max_steps", 8)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step=6.ckpt", "step=8.ckpt"]
    check_whole(tmp_path / "checkpoints" / "step=6.ckpt")
