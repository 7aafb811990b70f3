"""Runs what is measured in processes of their own, so that none has the memory or the imports of another."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

CONTEXT: SpawnContext = multiprocessing.get_context("spawn")
"""Makes the processes, each with a new interpreter."""


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Runs a function in a process that then ends, and returns its result; shows what it prints only if it fails.

    Args:
        function: A function of a module; its result must be picklable.
        arguments: Arguments of the function; they must be picklable.
    """
    with (
        tempfile.NamedTemporaryFile("r", errors="replace") as log,
        ProcessPoolExecutor(1, CONTEXT, print_to, (log.name,)) as pool,
    ):
        try:
            return pool.submit(function, *arguments).result()
        except (Exception, SystemExit) as error:
            sys.exit(f"{function.__name__}: {type(error).__name__}: {error}\n{log.read()[-3000:]}")


def start_fit(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Starts ``firefly-fit`` in a process that leads a group of its own.

    Args:
        arguments: Arguments of the command.
        log: File to which the process writes what it prints.
        environment: Environment variables that the process has beyond those of this one.
    """
    given = (list(arguments), str(log), dict(environment))
    process = CONTEXT.Process(target=_fit, args=given)
    process.start()
    return process


def _fit(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    print_to(log)
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from firefly_lightning.cli import main

    torch.set_num_threads(1)
    vars(rank_zero_only)["rank"] = int(environment.get("RANK", 0))  # Lightning reads RANK when it is imported
    sys.argv = ["firefly-fit", *arguments]
    main()


def print_to(log: str) -> None:
    """Appends what this process and its libraries print to the file ``log``."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        with contextlib.suppress(ValueError):
            stream.flush()
        os.dup2(file, number)
    os.close(file)
