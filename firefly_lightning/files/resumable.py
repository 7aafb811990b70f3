"""A file that is written in pieces, appears when it is whole, and after a kill is gone on with where it was."""

import fcntl
import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.files.atomic import partial_path


class ResumableFile:
    """Pieces and, with each, what its writer must know to go on; a context that ends in the file or in nothing.

    Beside the file lie, until it is whole, what has been written (``.NAME.partial``) and a line for every piece of it
    (``.NAME.journal``): its end, the digest of all bytes up to there, and the writer's state. Only a process that is
    killed or interrupted leaves them. A mistake removes them, since mending it makes another file.

    Args:
        target: The file.
        identity: What the content follows from; what was left under another identity is written anew.

    Attributes:
        state: What the writer had said with the last whole piece; None where there is nothing to go on from.

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
            self._lock()
            self._lines = self.journal.open("a+b")
            self._find_last_piece()
        except OSError as error:
            raise FireflyError(describe_os_error(error, self.target)) from error
        return self

    def append(self, piece: bytes, state: Any) -> None:
        """Adds a piece; after a kill from here on, the next process finds ``state``."""
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
        if error is None or isinstance(error, Exception):
            for path in (self.partial, self.journal):
                with suppress(OSError):
                    path.unlink()
        if isinstance(error, OSError):
            raise FireflyError(describe_os_error(error, self.target)) from error

    def _lock(self) -> None:
        try:
            # Not flock, whose lock would live on in the workers of a process that was killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise FireflyError(f"{self.target}: another process is writing it; wait, or name another file") from error

    def _find_last_piece(self) -> None:
        """Goes to the end of the last piece that is whole on the disk, after a power failure too."""
        self._lines.seek(0)
        header, *lines = [line for line in self._lines.read().split(b"\n") if line] or [b""]
        end = 0
        if header == self.identity.encode():
            for line in lines:
                with suppress(ValueError):  # the last one may have been cut
                    end = self._accept(json.loads(line), end)
        if self.state is None:
            self._lines.truncate(0)
            self._lines.write(self.identity.encode() + b"\n")
            self._digest.reset()
        self._file.truncate(end if self.state is not None else 0)
        self._file.seek(0, 2)

    def _accept(self, line: dict[str, Any], start: int) -> int:
        """Takes over the state of a line if the file agrees with it up to there; returns where its piece ends."""
        self._file.seek(start)
        self._digest.update(self._file.read(line["end"] - start))
        if self._digest.hexdigest() != line["digest"]:
            raise ValueError("the file is not what the journal says")
        self.state = line["state"]
        return int(line["end"])


def code_digest(*modules: str) -> str:
    """A digest of source files: what they make may differ when they do."""
    digest = xxhash.xxh3_128()
    for module in modules:
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()
