"""Lightning's plugin that writes and reads checkpoints where one process has all of a model."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from firefly_lightning.checkpoints.contents import OF_A_RUN, check_contents
from firefly_lightning.checkpoints.layout import TRAINER_FILE, WRITER_KEY
from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.torch_file import load_file, save_file
from firefly_lightning.checkpoints.unsharded import can_be_portable, read_whole, write_whole
from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.files.atomic import remove_whole, whole_file, whole_folder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams checkpoints to disk and gives them their names only when they are complete: a failed save costs nothing.

    Lightning's own plugin first copies the whole checkpoint in memory, and runs whatever code a loaded file holds.

    Args:
        portable: Whether a checkpoint is a folder that every strategy reads, as
            ``firefly_lightning.checkpoints.layout`` describes it, or the file that Lightning writes. A strategy that
            shards a model follows this too.
    """

    def __init__(self, portable: bool = True) -> None:
        super().__init__()
        self.portable = portable

    def in_own_form(self) -> "AtomicCheckpointIO":
        """A copy of this plugin that writes checkpoints that are not portable; this plugin stays as it is."""
        own = copy(self)
        own.portable = False
        return own

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint beside ``path``, then renames it.

        Raises:
            FireflyError: If the disk does not take the checkpoint; an earlier one at ``path`` stays as it was.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            if self.portable and can_be_portable(checkpoint):
                with whole_folder(Path(path)) as folder:
                    write_whole(checkpoint, folder)
                return
            with whole_file(Path(path)) as file:
                save_file(checkpoint, file)
        except (OSError, RuntimeError) as error:
            os_error = _os_error_behind(error)
            if os_error is None:
                raise
            message = describe_os_error(os_error, path)
            raise FireflyError(f"{message}; the checkpoint was not saved, earlier ones are untouched") from error

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
        """Removes a checkpoint, so that a half-removed one is never taken for a checkpoint."""
        if _is_remote(path):
            super().remove_checkpoint(path)
        elif Path(path).exists():
            remove_whole(Path(path))


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
