"""Real llama.cpp, in a process of Node.js that answers requests."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.helpers import ROOT


@cache
def llama_folder() -> str:
    """Where `bin/make-llama` has put it, or puts it now."""
    return subprocess.run([ROOT / "bin" / "make-llama"], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def llama(file: Path) -> Iterator[Any]:
    """Makes `ask(do, **request)`, which asks llama.cpp about a GGUF."""
    command = ["node", ROOT / "tests" / "support" / "llama.mjs", llama_folder(), file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as node:

        def ask(do: str, **request: Any) -> Any:
            print(json.dumps({"do": do, **request}), file=node.stdin, flush=True)
            while line := node.stdout.readline():
                if line[:1] in "[{":
                    return json.loads(line)
            raise AssertionError(f"llama.cpp ended with {node.wait()}")

        yield ask
        node.stdin.close()
        assert node.wait(60) == 0
