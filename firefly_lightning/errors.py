"""The one exception for what a user can mend, the wording of its message, and how a program reports it."""

import errno
import math
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_PATIENCE = 5.0
"""Seconds that a rank waits for its parent process to report a mistake that both have met."""

_READER_GONE = 141
"""Exit code of a process whose output nobody reads any more, as of ``firefly-fit --help | head``: 128 and SIGPIPE."""

_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Timed out waiting \d+ms for \w+ operation"
    r"|NCCL (communicator was aborted|remote process exited)|Watchdog caught collective operation timeout"
)
"""What gloo and NCCL say when a process at the other end is gone."""


class FireflyError(Exception):
    """Something in the user's files, flags or machine is wrong.

    The message is one line and says what is wrong, where it is, and what to do about it.
    """


class MissingFileError(FireflyError, FileNotFoundError):
    """A named file or checkpoint is not there; code that calls Lightning may expect a ``FileNotFoundError``."""


class KilledWorkerError(FireflyError):
    """A worker process was killed; what had been done is whole, and a next run goes on with it."""


@contextmanager
def one_line_errors(program: str, *others: type[Exception]) -> Iterator[None]:
    """Ends the process with one line and exit code 1 on a mistake of the user's; anything else keeps its traceback.

    Args:
        program: Name of the program, which opens the line.
        others: Further exceptions that speak of a user's mistake.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where it is known what to do if nobody reads it
    except FireflyError as error:
        _exit(program, str(error))
    except others as error:
        _exit(program, str(error))
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        sys.exit(_READER_GONE)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _exit(program, describe_os_error(error))
    except RuntimeError as error:
        if not (lost := _LOST_PEER.search(str(error))):
            raise
        message = f"another process of this run ended or cannot be reached ({lost[0]})"
        _exit(program, f"{message}; look for its own message, then resume with --ckpt_path last", wait=_PATIENCE + 1)


def describe_os_error(error: OSError, path: str | Path | None = None) -> str:
    """One line that names the file, what the system answered and, for a full disk, what to do."""
    where = path or error.filename or "the disk"
    hint = "; free some space or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}: {error.strerror or error}{hint}"


def unreadable(error: OSError, path: str | Path) -> FireflyError:
    """The error to raise where the system does not let a file be read."""
    kind = MissingFileError if isinstance(error, FileNotFoundError) else FireflyError
    return kind(describe_os_error(error, path))


def reason(error: BaseException) -> str:
    """What a library says went wrong, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def full_width_hint(path: Path) -> str:
    """What to say of YAML that cannot be read where a key of the file ends in a full-width colon; else nothing."""
    lines = path.expanduser().read_text("utf-8", "replace").splitlines()
    found = [number for number, line in enumerate(lines, 1) if re.match(r"\s*(- +)?[\w.]+：", line)]
    return f"; line {found[0]} has a full-width colon (：), write : and a blank" if found else ""


def some(names: list[str], count: int = 3) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def shown(name: str) -> str:
    """A name or text of a user's for a message: one of odd characters is escaped, and a long one cut."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 80 else f"{text[:79]}…"


def require(extra: str, *packages: str) -> None:
    """Checks that packages of an extra are installed, without importing them.

    Args:
        extra: Name of the extra that has them.
        packages: Names of the packages.

    Raises:
        FireflyError: If one of them is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise FireflyError(f'{package} is not installed; run pip install "firefly-lightning[{extra}]"')


def check_number(
    name: str,
    value: float | None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> None:
    """Checks a number that a user wrote.

    Args:
        name: The key or flag that sets the number.
        value: The number; None, where nothing is set, is accepted.
        least: Least number that is accepted.
        most: Largest number that is accepted.
        above: A number that it must be larger than.

    Raises:
        FireflyError: If the number is not finite or not in this range.
    """
    bounds = {"at least": least, "above": above, "at most": most}
    fits = value is None or (
        math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
    )
    if not fits:
        finite = value is not None and math.isfinite(value)
        wanted = [f"{text} {bound:,}" for text, bound in bounds.items() if bound is not None]
        raise FireflyError(f"{name} is {value}; it must be {' and '.join([*([] if finite else ['finite']), *wanted])}")


def _nobody_reads() -> bool:
    """Whether the reader of the standard output is gone; a pipe between processes may break, too."""
    try:
        watched = select.poll()
        watched.register(sys.stdout.fileno(), select.POLLOUT)
        return any(events & select.POLLERR for _, events in watched.poll(0))
    except (OSError, ValueError):  # no file of the system
        return False


def _exit(program: str, message: str, code: int = 1, wait: float = 0.0) -> None:
    """Prints the error and ends the process, after ``wait`` seconds in which ranks that it started can still report."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if not rank or not _parent_ends():
        name = f"{program} (rank {rank})" if rank else program
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    time.sleep(wait if not rank else 0.0)
    sys.exit(code)


def _parent_ends(seconds: float = _PATIENCE) -> bool:
    """Whether the process that started this one ends within ``seconds``: it has then reported the same mistake."""
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent
