"""What constructors and Lightning refuse, in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError


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
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        if trace is None or not Path(trace.tb_frame.f_code.co_filename).is_relative_to(package):
            raise
        raise FireflyError(_line(str(error))) from error


def _line(text: str) -> str:
    return " ".join(text.split())
