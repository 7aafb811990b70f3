"""What constructors and Lightning refuse, in one line."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from firefly_lightning.errors import FireflyError, reason


class Refusals:
    """Notes what constructors refuse, since jsonargparse buries it in what it says of all the types that it has tried.

    Args:
        others: Exceptions beside ``ValueError``, ``TypeError`` and ``ImportError`` that speak of a user's mistake.

    Attributes:
        noted: The last refusal: one line where it speaks of a user's mistake, else the exception as it was raised.
    """

    def __init__(self, *others: type[Exception]) -> None:
        self.noted: Exception | None = None
        self._mistakes: tuple[type[Exception], ...] = (ValueError, TypeError, ImportError, *others)

    def noting(self, make: Callable[..., Any]) -> "Noting":
        """What makes an object as the given function does, and notes why it cannot be made."""
        return Noting(self, make)

    def note(self, kind: type, error: Exception) -> Exception:
        """Notes what the constructor of a class has raised; returns what to raise in its place."""
        mistake = isinstance(error, self._mistakes)
        self.noted = FireflyError(f"{kind.__name__}: {_line(str(error))}") if mistake else error
        return self.noted


class Noting:
    """Makes objects; a class and no closure, since Lightning hands the parser to the processes that it spawns.

    Args:
        refusals: Where to note what is refused.
        make: Makes an object of a class from its arguments.
    """

    def __init__(self, refusals: Refusals, make: Callable[..., Any]) -> None:
        self._refusals, self._make = refusals, make

    def __call__(self, kind: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        """An object of a class; what its constructor refuses is noted."""
        try:
            return self._make(kind, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)
        except Exception as error:
            noted = self._refusals.note(kind, error)
            if noted is error:
                raise
            raise noted from error


@contextmanager
def refusals_of(package: Path) -> Iterator[None]:
    """Makes one line of what a package's own code says of settings; an error from elsewhere keeps its traceback.

    Args:
        package: Folder of the package.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        *_, last = _frames(error)
        if not Path(last.f_code.co_filename).is_relative_to(package):
            raise
        raise FireflyError(_line(str(error))) from error


@contextmanager
def checkpoint_errors(connector: Path, *others: type[Exception]) -> Iterator[None]:
    """Makes one line of what fails while Lightning takes over a checkpoint's states, as those of a forged one can.

    Args:
        connector: File of the code of Lightning that takes states over.
        others: Exceptions whose messages say enough, or that are no fault of a checkpoint.
    """
    passed: tuple[type[Exception], ...] = (FireflyError, OSError, MemoryError, *others)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        ours = (frame for frame in _frames(error) if frame.f_code.co_filename == str(connector))
        restoring = [frame for frame in ours if frame.f_code.co_name.startswith("restore_")]
        if not restoring:
            raise
        path, what = restoring[-1].f_locals["self"]._ckpt_path, restoring[-1].f_code.co_name.replace("_", " ")
        said = f"{type(error).__name__}: {reason(error)}"
        raise FireflyError(f"{path}: could not {what} from it ({said}); use an earlier checkpoint") from error


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The calls that an error came through, the outermost first."""
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _line(text: str) -> str:
    return " ".join(text.split())
