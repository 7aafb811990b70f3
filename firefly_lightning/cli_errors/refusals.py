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

    def noting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """A function that makes an object as the given one does, and notes why it cannot be made."""

        def note(kind: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
            try:
                return make(kind, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)
            except self._mistakes as error:
                self.noted = FireflyError(f"{kind.__name__}: {_line(str(error))}")
                raise self.noted from error
            except Exception as error:
                self.noted = error
                raise

        return note


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
