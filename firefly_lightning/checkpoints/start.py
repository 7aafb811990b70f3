"""The checkpoint that a run begins with, and whether it then is the run that saved it or one of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from firefly_lightning.checkpoints.contents import check_contents
from firefly_lightning.checkpoints.layout import LAST_STEP_KEY, RUN_KEY
from firefly_lightning.checkpoints.newest import AUTO, Newest, newest_whole, slurm_checkpoint
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import FireflyError, MissingFileError

_KEPT = (RUN_KEY, LAST_STEP_KEY, "global_step")


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        checkpoint: The checkpoint, or None.
        saved: What it says of its run, by the keys of ``_KEPT``; empty without a checkpoint.
        same_run: Whether it goes on as the run that saved it, from the last that it saved.
        lines: What there is to say of how it was found.
    """

    checkpoint: Path | None = None
    saved: Mapping[str, Any] = {}
    same_run: bool = False
    lines: Sequence[str] = ()


def find_start(asked: str | None, command: str, folders: Mapping[str, Path], root: Path, mode: str) -> Start:
    """Finds what a run begins with.

    Args:
        asked: What ``ckpt_path`` says: a path, or ``last``, ``best``, ``auto`` or ``hpc``.
        command: The command of ``firefly-fit``.
        folders: The folders of the checkpoints called ``last`` and ``best``, by these names.
        root: The run's own folder.
        mode: Whether the lowest (``min``) or the highest (``max``) value is best.

    Raises:
        MissingFileError: If there is no such checkpoint.
        FireflyError: If ``asked`` is empty or not for this command, or if the checkpoint is damaged.
    """
    if asked == "":
        raise FireflyError("ckpt_path is empty; name a checkpoint, last or best, or leave the key out")
    if asked == AUTO:
        if command != "fit":
            raise FireflyError(
                "ckpt_path auto is for fit, which begins anew where there is no checkpoint; "
                f"{command} takes last, best or a path"
            )
        found = newest_whole(folders.values(), root)
        return _start(found.path, True, _said(found, folders["last"]))
    if asked in (None, "hpc"):  # what Lightning then takes in a job that SLURM has requeued
        return _start(slurm_checkpoint(root) if SLURMEnvironment.detect() else None, command == "fit")
    folder = folders.get(asked, Path())
    if asked == "last" and command == "fit" and not folder.is_dir():
        raise MissingFileError(f"{folder / asked}: no such checkpoint yet; to begin anew, let ckpt_path be auto")
    if asked not in folders and asked == Path(asked).name and not Path(asked).exists():  # a mistyped word
        words = "last, best or auto" if command == "fit" else "last or best"
        raise MissingFileError(f"{asked}: no such checkpoint; ckpt_path takes {words}, or a path")
    return _start(find_checkpoint(str(folder / asked), mode), command == "fit" and asked == "last")


def _start(checkpoint: Path | None, same_run: bool, lines: Sequence[str] = ()) -> Start:
    if checkpoint is None:
        return Start(lines=lines)
    saved = load_file(trainer_file(checkpoint), "cpu")
    check_contents(saved, trainer_file(checkpoint))
    # Not all of it: its tensors would keep the file, which a save replaces, for as long as the run lasts.
    return Start(checkpoint, {key: saved[key] for key in _KEPT if key in saved}, same_run, lines)


def _said(found: Newest, folder: Path) -> list[str]:
    passed = [f"ckpt_path auto: passes over {line}" for line in found.passed_over]
    if found.path is None:
        return [f"ckpt_path auto: no checkpoint in {folder} yet, so the run begins anew"]
    return [*passed, f"ckpt_path auto: goes on from {found.path}, saved after {found.step:,} steps"]
