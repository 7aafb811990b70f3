"""SIGINT and SIGTERM end every command soon, at any moment, once or twice, and leave neither processes nor files."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import psutil
import pytest
import yaml

from tests.conftest import write_rows
from tests.support.choice import DIVIDED
from tests.support.helpers import PATIENCE, ROOT, fit
from tests.support.ranks import BIN

MOMENTS = int(os.environ.get("FIREFLY_MOMENTS", 2))
"""In which each command is told to end by each signal, every second time twice; a release is tried with 20.

With `--divided` one moment and one signal: commands are told in turn by the one and the other, once and twice; and
only some run to their end first.
"""

TAKE_AS_LONG = (
    {
        "build alone": "build",
        **dict.fromkeys(("stats", "prune", "plan", "validate", "predict", "test", "chat"), "export"),
    }
    if DIVIDED
    else {}
)
"""Commands that are not run to their end to see how long they take, and one that takes no longer."""

SECONDS = 3.0 * float(os.environ.get("FIREFLY_SLOWNESS", 2))
"""In which it must have ended: three on a machine with nothing else to do."""

WEATHER = "今天很好，" * 20


@pytest.fixture(scope="module")
def places(tmp_path_factory, model_folder, rows_file) -> dict[str, Path]:
    """What the commands read: enough rows that no part of them is over at once."""
    folder = tmp_path_factory.mktemp("signals")
    rows = [{"kind": "NLI", "input": f"第{number}天：{WEATHER}", "target": f"好{number}"} for number in range(6000)]
    raw = [{"text": row["input"], "label": "positive"} for row in rows * 4]
    run = {
        "model": {"path": str(model_folder)},
        "data": {"train_files": str(rows_file), "val_files": str(rows_file), "micro_batch_size": 1},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), "utf-8")
    run["trainer"]["limit_predict_batches"] = 15
    (folder / "predicting.yaml").write_text(yaml.safe_dump(run), "utf-8")
    fit(model_folder, rows_file, folder / "trained", "--trainer.max_steps", 1, "--data.batch_size", 4)
    return {
        "rows": write_rows(folder / "rows.jsonl", rows),
        "raw": write_rows(folder / "raw.jsonl", raw),
        "model": model_folder,
        "config": folder / "run.yaml",
        "predicting": folder / "predicting.yaml",
        "checkpoint": folder / "trained" / "checkpoints",
    }


COMMANDS = {
    "build": "firefly build --kind SentimentAnalyze --source {raw} --out {out} --workers 2",
    "build alone": "firefly build --kind SentimentAnalyze --source {raw} --out {out} --workers 1",
    "clean": "firefly clean --files {rows} --out {out}",
    "stats": "firefly stats --files {rows} --tokenizer {model} --out {out}",
    "prune": "firefly prune --model {model} --corpus {rows} --out {out} ",
    "plan": "firefly plan --config {config} --out {out}",
    "validate": "firefly-fit validate --config {config} --trainer.default_root_dir {out}",
    "predict": "firefly-fit predict --config {predicting} --trainer.default_root_dir {out}",
    "fit": "firefly-fit fit --config {config} --trainer.default_root_dir {out}",
    "test": "firefly-fit test --config {config} --trainer.default_root_dir {out} --model.decoding.max_new_tokens 9",
    "export": "firefly export --checkpoint {checkpoint} --out {out}",
    "chat": "firefly chat --model {model} --device cpu --prompt 你好 --max_new_tokens 60",
}


@pytest.fixture(scope="module")
def seconds(places, tmp_path_factory) -> Callable[[str], float]:
    """How long a command takes; measured once."""

    @cache
    def of(name: str) -> float:
        folder = tmp_path_factory.mktemp("whole")
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
            return ended(name, places, folder / "whole", None, 0)[0]

    return of


SIGNALS = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (name, number)
        for at, name in enumerate(COMMANDS)
        for number in (SIGNALS if not DIVIDED else SIGNALS[at % 2 : at % 2 + 1])
    ],
)
def test_a_signal_ends_a_command(name, number, places, seconds, tmp_path, monkeypatch):
    drawn = random.Random(f"{name} {number}")
    first = (list(COMMANDS).index(name) // 2 + (number == signal.SIGTERM)) % 2
    for moment in range(first, first + 1) if DIVIDED else range(MOMENTS):
        # What is over is not told to end.
        after = drawn.uniform(0.5, 0.95 * seconds(TAKE_AS_LONG.get(name, name)))
        for attempt in range(9):
            folder = tmp_path / f"{moment}.{attempt}"
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder.with_suffix(".cache")))  # empty, as for the whole command
            took, process = ended(name, places, folder, number, after, twice=moment % 2 == 1)
            if took is not None:
                break
            after *= 0.7  # it had ended before, on a machine that has less to do than it had
        assert took is not None
        said = process.stderr.read().decode("utf-8", "replace")
        assert process.returncode in (128 + number, -number), f"{after}: {process.returncode}\n{said}"
        assert took < SECONDS, f"{after}: {took}\n{said}"
        assert "Traceback" not in said, said
        hidden = [path.relative_to(folder) for path in folder.rglob(".*")]
        left = {re.sub("-[0-9a-f]{16}", "", str(path)) for path in hidden if ".out.work-" not in str(path.parent)}
        may_be_left = {".out.partial", ".out.journal", ".out.work"}
        assert left <= may_be_left, "builds and cleanings go on from these, nothing else is left"


def ended(name: str, places: dict[str, Path], folder: Path, number: int | None, after: float, twice: bool = False):
    """Runs a command until it ends, or a signal after some seconds ends it; how long that took, and the process."""
    folder.mkdir()
    words = [word.format(**places, out=folder / "out") for word in COMMANDS[name].split()]
    started = time.monotonic()
    with (folder.parent / f"{folder.name}.err").open("w+b") as errors:
        process = subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=ROOT,
            start_new_session=True,
        )
    process.stderr = (folder.parent / f"{folder.name}.err").open("rb")
    if number is None:
        assert process.wait(PATIENCE) == 0, process.stderr.read().decode()
        return time.monotonic() - started, process
    time.sleep(after)
    if process.poll() is not None:
        return None, process
    family = psutil.Process(process.pid).children(recursive=True)
    told = time.monotonic()
    process.send_signal(number)
    if twice:
        time.sleep(0.1)
        process.send_signal(number)
    process.wait(60)
    took = time.monotonic() - told
    _, alive = psutil.wait_procs(family, timeout=1)
    alive = [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"{after}: {alive}"
    return took, process
