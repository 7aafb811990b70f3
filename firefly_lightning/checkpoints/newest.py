"""The newest whole checkpoint of a run: what a launcher goes on from that gives the same command at every start."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from firefly_lightning.checkpoints.contents import DAMAGED, OF_A_RUN, check_contents
from firefly_lightning.checkpoints.layout import RUN_KEY
from firefly_lightning.checkpoints.own_form import read_own
from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import FireflyError, MissingFileError
from firefly_lightning.files.atomic import replaced_paths

AUTO = "auto"
"""What ``--ckpt_path`` says for the newest whole checkpoint of the run, and for a fresh start where there is none."""

_NAMES = ("last*.ckpt", "step=*.ckpt", "best-*.ckpt")
"""Names of the checkpoints that a run saves; of several after the same step, those of the first name are taken."""

_OF_SLURM = "hpc_ckpt_*.ckpt"
"""Name of the checkpoints that Lightning saves into the folder of a run before SLURM requeues it."""


class Newest(NamedTuple):
    """What was found.

    Attributes:
        path: The newest whole checkpoint; None where there is no checkpoint at all.
        step: Number of optimizer steps that it was saved after.
        passed_over: For each checkpoint that is damaged and may be newer, a line that names it and what is wrong.
    """

    path: Path | None
    step: int
    passed_over: Sequence[str]


class _Candidate(NamedTuple):
    """A checkpoint, and what orders it among others.

    Attributes:
        path: The checkpoint.
        began: When its run began, which is later for every run in the same folder; 0 where an older release saved it.
        step: Number of optimizer steps; of one that cannot be read, the one in its name, or None.
        changed: When it was changed last, which copying may have changed, too.
        problem: Why it cannot be read.
    """

    path: Path
    began: float
    step: int | None
    changed: float
    problem: str = ""

    def age(self) -> tuple[float, float]:
        """What is larger for a newer checkpoint: by runs, then by steps."""
        return self.began, self.step if self.began and self.step is not None else self.changed


def newest_whole(folders: Iterable[Path], root: Path) -> Newest:
    """The newest whole checkpoint of a run, of any form, the best and those of SLURM among them.

    Where several runs have saved into a folder, it is of the one that began last. Checkpoints are read in full, one
    after another and the newest first, until one is whole; of the others only the step is read.

    Args:
        folders: Folders that the run saves checkpoints into.
        root: The run's own folder.

    Raises:
        FireflyError: If there are checkpoints, and none of them is whole.
    """
    candidates = [_look_at(path) for path in _paths(folders, root)]
    problems = {one: one.problem for one in candidates if one.problem}
    for one in sorted((one for one in candidates if not one.problem), key=_Candidate.age, reverse=True):
        try:
            check_whole(one.path)
        except FireflyError as error:
            _raise_if_closed(error)
            problems[one] = str(error)
            continue
        newer = [text for other, text in problems.items() if other.step is None or other.step > (one.step or 0)]
        return Newest(one.path, one.step or 0, [*map(_without_cure, newer)])
    if problems:
        first, *others = map(_without_cure, problems.values())
        more = f" (and {len(others)} more are not)" if others else ""
        raise FireflyError(
            f"{first}; no checkpoint of the run is whole{more}: bring one back, or move them away to begin anew"
        )
    return Newest(None, 0, [])


def check_whole(checkpoint: Path) -> None:
    """Checks that a run can go on from a checkpoint: all its files are whole and hold what a run saves.

    What has been read for it is not digested again when the same process loads it.

    Raises:
        MissingFileError: If a file of it is missing.
        FireflyError: If it is damaged, or holds weights alone.
    """
    if PortableReader.is_at(checkpoint):
        contents = PortableReader(checkpoint).trainer()
    elif checkpoint.is_dir():
        contents = read_own(checkpoint)
    else:
        contents = load_file(checkpoint, "cpu")
        check_contents(contents, checkpoint, required=OF_A_RUN)
    if "lr_schedulers" not in contents:
        raise FireflyError(f"{checkpoint}: holds weights alone")


def slurm_checkpoint(root: Path) -> Path | None:
    """The checkpoint that Lightning goes on from in a job that SLURM has requeued; None where there is none."""
    matches = ((re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", path.name), path) for path in root.glob(_OF_SLURM))
    numbered = [(int(found[1]), path) for found, path in matches if found]
    return max(numbered)[1] if numbered else None


def _paths(folders: Iterable[Path], root: Path) -> Iterator[Path]:
    """All checkpoints of a run, whole or not; one that a name links to has that name only."""
    seen = set()
    places = [(folder, name) for name in _NAMES for folder in dict.fromkeys(folders)]
    for folder, name in [*places, (root, _OF_SLURM)]:
        for path in (*sorted(folder.glob(name)), *sorted(replaced_paths(folder, name))):
            # A name may link to a checkpoint that a save has since removed.
            if path.exists() and (place := path.resolve()) not in seen:
                seen.add(place)
                yield path


def _look_at(path: Path) -> _Candidate:
    """What orders a checkpoint, from the little that is read for it: digests are left to who takes it."""
    try:
        changed = path.stat().st_mtime
        contents = load_file(trainer_file(path), "cpu", digested=False)
        check_contents(contents, trainer_file(path), required=OF_A_RUN)
    except FileNotFoundError as error:
        return _Candidate(path, 0.0, _named_step(path), 0.0, str(error))
    except FireflyError as error:
        _raise_if_closed(error)
        return _Candidate(path, 0.0, _named_step(path), changed, str(error))
    return _Candidate(path, float(contents.get(RUN_KEY, {}).get("began", 0)), contents["global_step"], changed)


def _named_step(path: Path) -> int | None:
    found = re.search(r"step=(\d+)", path.name)
    return int(found[1]) if found else None


def _raise_if_closed(error: FireflyError) -> None:
    """Raises what says nothing of the checkpoint itself: passing over it for that would lose what it holds."""
    if isinstance(error.__cause__, PermissionError | TimeoutError) and not isinstance(error, MissingFileError):
        raise error


def _without_cure(message: str) -> str:
    return message.removesuffix(f"; {DAMAGED}").removesuffix("; use an earlier one")
