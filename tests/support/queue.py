"""A queue of test files that several processes of pytest take from, so that no core waits, and the time of each file.

`bin/test` gives `--queue=FOLDER` to all processes of a stack. The process that makes a file's folder in it runs the
file.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = (
    "tests/integration/test_launching.py", "tests/integration/test_readme.py",
    "tests/strategies/native/test_strategy.py", "tests/integration/test_moving.py",
    "tests/integration/test_interrupts.py", "tests/strategies/deepspeed/test_strategy.py",
    "tests/integration/test_resume.py",
    "tests/strategies/deepspeed/test_refusals.py", "tests/integration/test_engine_parity.py",
    "tests/integration/test_predict.py", "tests/integration/test_parity.py", "tests/benchmarks/test_plan.py",
    "tests/strategies/colossalai/test_strategy.py", "tests/strategies/deepspeed/test_checkpoints.py",
    "tests/benchmarks/test_start.py", "tests/callbacks/test_lightning_callbacks.py",
)  # fmt: skip
"""Files to begin first, since a long one that begins last leaves a core without work."""

LARGEST_SHARE = 0.12
"""Share of the time of all files of `bin/test --divided`, both stacks together, that one file may take.

Two cores share that time, so this is a quarter of the time that one waits for them, and how late one core may be. A
longer file has to be divided or made shorter."""

LEAST_SECONDS = 180
"""Seconds that a file may take whatever its share is, since the share in a run of few files says nothing."""


def pytest_addoption(parser):
    parser.addoption("--queue", type=Path, metavar="FOLDER", help="leave files to others that were given this folder")


def pytest_configure(config):
    config.pluginmanager.register(Files(config.getoption("--queue")), "files")


class Files:
    """A plugin of pytest that takes files from the queue, if there is one, and notes the time of each file it runs."""

    def __init__(self, queue: Path | None):
        self.queue, self.seconds = queue, {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: LONGEST.index(file_of(item)) if file_of(item) in LONGEST else len(LONGEST))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Runs the tests as pytest does, without the files that another process has taken."""
        if self.queue is None or session.config.option.collectonly or session.testsfailed:
            return None
        for items in self.taken(session):
            # Fixtures of the session stay after the last test of a file, since the next file is not known yet.
            for item, following in zip(items, [*items[1:], session], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
            name = file_of(items[0])
            (self.place(name) / "seconds").write_text(str(self.seconds[name]))
        return True

    def taken(self, session) -> Iterator[list[pytest.Item]]:
        files = {}
        for item in session.items:
            files.setdefault(file_of(item), []).append(item)
        *_, last = files
        for name, items in files.items():
            try:
                self.place(name).mkdir(parents=True)
            except FileExistsError:
                continue
            if name == last:  # no further process needs to begin
                (self.queue / "empty").touch()
            yield items

    def place(self, name: str) -> Path:
        return self.queue / name.replace("/", "+")

    def pytest_runtest_logreport(self, report):
        name = file_of(report)
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration

    def too_long(self) -> list[str]:
        """Messages about files of this process that took too long; each process reports its own files."""
        times = [float(path.read_text()) for path in self.queue.parent.glob("*/*/seconds")] if self.queue else []
        whole = sum(times or self.seconds.values())
        return [
            f"{name} took {seconds:.0f} s, {seconds / whole:.0%} of {whole:.0f} s; at most {LARGEST_SHARE:.0%} are its "
            "share (LARGEST_SHARE in tests/support/queue.py): divide it, or make it shorter"
            for name, seconds in self.seconds.items()
            if seconds > max(LEAST_SECONDS, LARGEST_SHARE * whole)
        ]

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.OK and whole_run(session.config) and self.too_long():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, config):
        if config.option.durations:
            terminalreporter.section("longest files")
            for name, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1])[:15]:
                terminalreporter.line(f"{seconds:7.1f} s  {name}")
        if whole_run(config):
            for line in self.too_long():
                terminalreporter.line(f"ERROR {line}", red=True)


def whole_run(config: pytest.Config) -> bool:
    """Whether all tests of a divided run are run; only then do shares of its time mean something."""
    chosen = config.option.keyword or config.option.markexpr
    return config.getoption("--divided") and config.args_source == config.ArgsSource.TESTPATHS and not chosen


def file_of(of: pytest.Item | pytest.TestReport) -> str:
    return of.nodeid.split("::")[0]
