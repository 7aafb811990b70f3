"""Lightning's plugin that writes and reads checkpoints where one process has all of a model."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from firefly_lightning.checkpoints.background import BackgroundSaves, OthersAreGone, Together
from firefly_lightning.checkpoints.contents import OF_A_RUN, check_contents
from firefly_lightning.checkpoints.host_copies import HostCopies
from firefly_lightning.checkpoints.layout import TRAINER_FILE, WRITER_KEY
from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.torch_file import load_file, save_file
from firefly_lightning.checkpoints.unsharded import begin_whole, can_be_portable, read_whole
from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.files.atomic import remove_whole, whole_file, whole_folder
from firefly_lightning.files.links import link_whole

NEEDS_PORTABLE = (
    "checkpoint.asynchronous: only portable checkpoints are written beside the training; set checkpoint.portable true"
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams checkpoints to disk and gives them their names only when they are complete: a failed save costs nothing.

    Lightning's own plugin first copies the whole checkpoint in memory, and runs whatever code a loaded file holds.

    Args:
        portable: Whether a checkpoint is a folder that every strategy reads, as
            ``firefly_lightning.checkpoints.layout`` describes it, or the file that Lightning writes. A strategy that
            shards a model follows this too.
        asynchronous: Whether a portable checkpoint is copied in host memory, and written from there while the training
            goes on. One that has not been written when the next is due is waited for. Without ``LastCheckpoint``, call
            ``saves.wait()`` before you use a checkpoint, and a failure shows at the next save or at the end.

    Attributes:
        at_once: Whether saves are complete when they return, although others are asynchronous.
        saves: The saves that go on.
        copies: Memory that they are written from.

    Raises:
        FireflyError: If checkpoints that are not portable are to be written asynchronously.
    """

    def __init__(self, portable: bool = True, asynchronous: bool = False) -> None:
        super().__init__()
        if asynchronous and not portable:
            raise FireflyError(NEEDS_PORTABLE)
        self.portable, self.asynchronous, self.at_once = portable, asynchronous, False
        self.saves, self.copies = BackgroundSaves(), HostCopies()

    @property
    def saves_aside(self) -> bool:
        """Whether the next portable checkpoint is copied, and written while the training goes on."""
        return self.asynchronous and not self.at_once

    def in_own_form(self) -> "AtomicCheckpointIO":
        """A copy of this plugin that writes checkpoints that are not portable; this plugin stays as it is."""
        own = copy(self)
        own.portable = own.asynchronous = False
        return own

    def in_background(self) -> "AtomicCheckpointIO":
        """A copy of this plugin that writes while the training goes on; this plugin stays as it is.

        Raises:
            FireflyError: If it writes checkpoints that are not portable.
        """
        if not self.portable:
            raise FireflyError(NEEDS_PORTABLE)
        own = copy(self)
        own.asynchronous = True
        return own

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint beside ``path``, then renames it.

        Raises:
            FireflyError: If the disk does not take the checkpoint, or did not take the one before; an earlier one at
                ``path`` stays as it was.
        """
        self.begin()
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        elif not (self.portable and can_be_portable(checkpoint)):
            if self.saves_aside:
                _say_once(f"{path}: cannot be a portable checkpoint, so that the training waits until it is saved")
            with saving(path), whole_file(Path(path)) as file:
                save_file(checkpoint, file)
        else:
            with ExitStack() as folder:
                with saving(path):
                    hidden = folder.enter_context(whole_folder(Path(path)))
                    complete = begin_whole(checkpoint, hidden, self.copies if self.saves_aside else None)
                self.complete(path, complete, folder.pop_all())

    def make_room(self, tensors: Iterable[Tensor]) -> None:
        """Has memory for copies of tensors allocated beside the training, so that the first save takes no longer.

        Args:
            tensors: What will be saved.
        """
        sizes = {False: 0, True: 0}
        for tensor in tensors:
            sizes[tensor.is_cuda] += tensor.nbytes
        for pinned, size in sizes.items():
            self.saves.submit(partial(self.copies.reserve, size, pinned))

    def begin(self, together: Together = lambda act: act()) -> None:
        """Waits for the save before this one.

        Args:
            together: Calls a function in all processes that save.

        Raises:
            FireflyError: If that save failed.
        """
        self.saves.settle(together)
        self.copies.clear()

    def complete(self, path: str | Path, write: Callable[[], None], folder: ExitStack) -> None:
        """Completes a save: at once, or in a thread of its own where saves are asynchronous.

        Args:
            path: Name of the checkpoint.
            write: Writes what is missing.
            folder: Its end gives the checkpoint its name.
        """

        def act() -> None:
            with saving(path), folder:
                write()

        if self.saves_aside:
            self.saves.submit(act)
        else:
            act()

    @override
    def teardown(self) -> None:
        """Waits for saves that go on; a failure is only printed where the run ends in another error."""
        ends_in_error = sys.exc_info()[0] is not None
        if ends_in_error:
            self.saves.hurry()
        try:
            self.saves.wait()
        except FireflyError as error:
            if not ends_in_error:
                raise
            if not isinstance(error, OthersAreGone):
                print(error, file=sys.stderr)
        finally:
            self.copies.free()

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads a checkpoint, portable or a file; objects that could run code only if ``weights_only`` is False.

        Everything that a ``Trainer`` saves for this package is tensors and plain values, on every supported release. A
        file that no run saved is read too, but a run cannot be resumed from it.

        Raises:
            MissingFileError: If there is no such file.
            FireflyError: If ``path`` is no checkpoint, is damaged, or holds objects that could run code.
        """
        weights_only = weights_only is not False
        self.saves.wait()
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if PortableReader.is_at(Path(path)):
            return read_whole(PortableReader(Path(path)))
        if Path(path).is_dir():
            trainer = load_file(Path(path) / TRAINER_FILE, "cpu")
            check_contents(trainer, Path(path) / TRAINER_FILE)
            engine = trainer.get(WRITER_KEY, {}).get("engine", "another strategy")
            raise FireflyError(f"{path}: is {engine}'s own; resume under the strategy that saved it")
        checkpoint = load_file(Path(path), map_location, weights_only)
        check_contents(checkpoint, Path(path))
        return checkpoint if checkpoint.keys() >= set(OF_A_RUN) else _OfNoRun(checkpoint, path)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint, so that a half-removed one is never taken for a checkpoint.

        What takes its place is complete by then: a save that goes on is waited for, beside the training.
        """
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            self.saves.after(lambda: _remove(Path(path)))

    def link(self, checkpoint: str | Path, name: str | Path) -> None:
        """Has a name lead to a checkpoint once that is complete; at no moment does it lead nowhere."""
        self.saves.after(lambda: link_whole(Path(checkpoint), Path(name)))


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turns a refusal of the system into one line that names the checkpoint.

    Raises:
        FireflyError: If the system refuses to write in the block.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        os_error = _os_error_behind(error)
        if os_error is None or isinstance(error, FireflyError):
            raise
        message = describe_os_error(os_error, path)
        raise FireflyError(f"{message}; the checkpoint was not saved, earlier ones are untouched") from error


class _OfNoRun(dict[str, Any]):
    """Contents of a file that no run saved, such as the weights that Lightning's own processes hand over.

    A run that resumes from such a file is refused, when Lightning asks for what every run saves.

    Args:
        contents: The dictionary that the file holds.
        path: Path of the file.
    """

    def __init__(self, contents: dict[str, Any], path: str | Path) -> None:
        super().__init__(contents)
        vars(self).update(getattr(contents, "__dict__", {}))  # versions of the modules that the weights are of
        self._path = path

    def __missing__(self, key: str) -> Any:
        if key in OF_A_RUN:
            raise FireflyError(f"{self._path}: is not a checkpoint of a run; name a file that training saved")
        raise KeyError(key)


@cache
def _say_once(message: str) -> None:
    rank_zero_info(message)


def _remove(path: Path) -> None:
    if path.exists():
        remove_whole(path)


def _os_error_behind(error: BaseException) -> OSError | None:
    """The system's error that led to an error, if any.

    After a failed write PyTorch closes its archive, fails again, and raises this second failure as a RuntimeError.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
