"""A parser that answers a mistake in one line, and reads files of configuration by their own rules."""

from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from firefly_lightning.cli_errors.environment import fill_in
from firefly_lightning.cli_errors.explain import explain, known_keys
from firefly_lightning.errors import FireflyError, describe_os_error, full_width_hint, reason
from firefly_lightning.files.json_object import RepeatedKeyError, check_keys


class OneLineErrors(ArgumentParser):  # type: ignore[misc]
    """A parser that raises a one-line :class:`FireflyError` where it would print its usage and exit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # a key that is cut short would be taken for another in silence

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the error; a parser inside a type reports to the parser around it, as in jsonargparse."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise FireflyError(explain(message, known_keys(self))) from ex

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parses the text of a configuration, in which variables of the environment may stand.

        Raises:
            FireflyError: If a variable is not set, or a value cannot be.
        """
        return super().parse_string(fill_in(content), *args, **kwargs)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parses a file of configuration, whose name every error begins with.

        Raises:
            FireflyError: If the file cannot be read, or holds a value that cannot be.
        """
        check_yaml(Path(path))
        try:
            return super().parse_path(path, *args, **kwargs)
        except FireflyError as error:
            raise FireflyError(f"{path}: {error}") from error


def check_yaml(path: Path) -> None:
    """Checks that a file of configuration is YAML, or JSON, that holds keys.

    Raises:
        FireflyError: If it is not, has a key twice, or cannot be read.
    """
    try:
        root = yaml.compose(path.expanduser().read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise FireflyError(describe_os_error(error, path)) from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise FireflyError(
            f"{path}: byte 0x{byte:02x} is not UTF-8; convert the file, for example with: iconv -f GB18030 -t UTF-8"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}" if mark else ""
        column = f" at column {mark.column + 1}" if mark else ""
        cure = full_width_hint(path) or "; mend the line"
        raise FireflyError(f"{path}{place}: not YAML, {error.problem or error.context}{column}{cure}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise FireflyError(f"{path}: not YAML ({reason(error)}); mend it") from error
    if not isinstance(root, yaml.MappingNode):
        raise FireflyError(f"{path}: holds no keys; a configuration is lines such as KEY: VALUE")
    try:
        check_keys(root)
    except RepeatedKeyError as error:
        raise FireflyError(f"{path}: {error}; keep one of them, or put what is below both under one") from error
