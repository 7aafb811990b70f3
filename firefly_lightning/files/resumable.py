"""Work that is done in pieces, whose result appears when it is whole; after a kill, it goes on where it stopped."""

import fcntl
import glob
import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from firefly_lightning.errors import FireflyError, KilledWorkerError, describe_os_error
from firefly_lightning.files.atomic import partial_path


class ResumableFile:
    """A file written piece by piece, each piece with the state that its writer needs to go on; used as a context.

    Until the file is whole, two hidden files lie beside it: the bytes written so far (``.NAME.partial``) and a journal
    (``.NAME.journal``) with a line for every piece: where the piece ends, the digest of all bytes up to there, and the
    writer's state. Only a process that is killed or interrupted leaves them for the next one. An error removes them and
    no file appears, since mending the error changes the content.

    Args:
        target: The file.
        identity: Text of all that the content follows from; pieces left under another identity are discarded.

    Attributes:
        state: The writer's state after the last whole piece; None where there is nothing to go on from.

    Raises:
        FireflyError: If the file cannot be written, or another process is writing it.
    """

    def __init__(self, target: Path, identity: str) -> None:
        self.target = target
        self.identity = xxhash.xxh3_128_hexdigest(identity.encode())
        self.partial = partial_path(target)
        self.journal = target.with_name(f".{target.name}.journal")
        self.state: Any = None
        self._digest = xxhash.xxh3_128()
        self._file: BinaryIO
        self._lines: BinaryIO

    def __enter__(self) -> "ResumableFile":
        try:
            if self.target.is_dir():
                raise FireflyError(f"{self.target}: is a folder; name a file")
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("a+b")
            lock(self._file, self.target, fcntl.LOCK_EX)
            self._lines = self.journal.open("a+b")
            self._find_last_piece()
        except OSError as error:
            raise FireflyError(describe_os_error(error, self.target)) from error
        return self

    def append(self, piece: bytes, state: Any) -> None:
        """Adds a piece; if this process is killed later, the next one finds ``state`` and goes on after the piece."""
        self._file.write(piece)
        self._file.flush()
        self._digest.update(piece)
        line = {"end": self._file.tell(), "digest": self._digest.hexdigest(), "state": state}
        self._lines.write(json.dumps(line).encode() + b"\n")
        self._lines.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file, self._lines:
                if kind is None:
                    self.partial.replace(self.target)
        except OSError as failure:
            error = failure
        if _ended(error):
            for path in (self.partial, self.journal):
                with suppress(OSError):
                    path.unlink()
        if isinstance(error, OSError):
            raise FireflyError(describe_os_error(error, self.target)) from error

    def _find_last_piece(self) -> None:
        """Moves to the end of the last piece that is whole on the disk, which holds after a power failure too."""
        self._lines.seek(0)
        header, *lines = [line for line in self._lines.read().split(b"\n") if line] or [b""]
        end = 0
        if header == self.identity.encode():
            for line in lines:
                with suppress(ValueError):  # the last line may have been cut
                    end = self._accept(json.loads(line), end)
        if self.state is None:
            self._lines.truncate(0)
            self._lines.write(self.identity.encode() + b"\n")
            self._digest.reset()
        self._file.truncate(end if self.state is not None else 0)
        self._file.seek(0, 2)

    def _accept(self, line: dict[str, Any], start: int) -> int:
        """Takes over the state of a journal line if the file agrees with the line; returns where its piece ends.

        Args:
            line: The line of the journal.
            start: Where the piece before it ends.

        Raises:
            ValueError: If the file's bytes up to the end of the piece are not those of the journal.
        """
        self._file.seek(start)
        self._digest.update(self._file.read(line["end"] - start))
        if self._digest.hexdigest() != line["digest"]:
            raise ValueError("the file is not what the journal says")
        self.state = line["state"]
        return int(line["end"])


def _ended(error: BaseException | None) -> bool:
    """Whether work is over, so that nothing of it is gone on with: done, or ended by what has to be mended first."""
    return error is None or (isinstance(error, Exception) and not isinstance(error, KilledWorkerError))


class WorkFolder:
    """A hidden folder beside an output, for pieces of work that it is made from; used as a context.

    A piece is a file that appears when it is whole. Only a process that is killed or interrupted, or whose worker is
    killed, leaves the folder for the next one. Another error removes it, since mending the error changes the pieces; so
    does the end of the work.

    Args:
        target: The output.
        identity: Text of all that the pieces follow from; what was left of the same output under another is removed.
        share: Name of the share of the work that is done here, where other processes have other shares; the folder is
            then left for the one that ends the work. None where all of it is done here.

    Attributes:
        path: The folder.

    Raises:
        FireflyError: If the folder cannot be made, or another process has it whole or has the same share.
    """

    def __init__(self, target: Path, identity: str, share: str | None = None) -> None:
        self.target, self.share = target, share
        self.path = target.with_name(f".{target.name}.work-{xxhash.xxh3_64_hexdigest(identity.encode())}")
        self._locks: list[BinaryIO] = []

    def __enter__(self) -> "WorkFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock("lock", fcntl.LOCK_SH if self.share else fcntl.LOCK_EX)
            if self.share:
                self._lock(f"{self.share}.lock", fcntl.LOCK_EX)
        except OSError as error:
            raise FireflyError(describe_os_error(error, self.target)) from error
        for other in () if self.share else self.target.parent.glob(f".{glob.escape(self.target.name)}.work-*"):
            if other != self.path:
                shutil.rmtree(other, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._locks:
            file.close()
        if not self.share and _ended(error):
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FireflyError):
            raise FireflyError(describe_os_error(error, self.target)) from error

    def _lock(self, name: str, kind: int) -> None:
        self._locks.append((self.path / name).open("a+b"))
        lock(self._locks[-1], self.target, kind)


def lock(file: BinaryIO, target: Path, kind: int) -> None:
    """Takes the lock of an open file, which is let go when the file is closed.

    Args:
        file: The file.
        target: The output whose making it guards.
        kind: The kind of lock, as ``fcntl.lockf`` takes it.

    Raises:
        FireflyError: If another process has it.
    """
    try:
        # lockf and not flock, whose lock would live on in the workers of a process that was killed.
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise FireflyError(f"{target}: another process is writing it; wait, or name another file") from error


def code_digest(*modules: str) -> str:
    """A digest of source files, as part of an identity: changed code may make other content."""
    digest = xxhash.xxh3_128()
    for module in modules:
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()
