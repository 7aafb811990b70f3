"""What a signal does within a command: it is never lost, and a second one leaves no time to tidy up."""

import os
import subprocess
import sys

import pytest

from tests.support.helpers import ROOT, wait_for_ends

TIDYING = """
import os, signal, subprocess, sys, time
from firefly_lightning.interrupts import ends_on_signals
signal.signal(signal.SIGCHLD, lambda number, frame: None)  # as PyTorch's loaders do
with ends_on_signals("firefly"):
    for _ in range(3):
        subprocess.run(["true"], check=True)
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(30)
    finally:
        time.sleep(0.5)
        print("tidied", flush=True)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_of_other_kinds_take_no_time_from_tidying_up(name, code):
    run = run_script(TIDYING.format(name=name))
    assert run.returncode == code, run.stderr
    assert run.stdout == "tidied\n"


LOST = """
import os, signal, subprocess, time
from firefly_lightning import interrupts

class Ending:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})

{before}
with interrupts.ends_on_signals("firefly"):
    print(subprocess.Popen(["sleep", "90"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, flush=True)
    Ending()
    {then}
    time.sleep(90)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(("before", "then"), [("", "pass"), ("interrupts.GRACE = 90", "Ending()")])
def test_a_signal_ends_a_command_where_python_drops_what_it_raises(name, code, before, then):
    """As in a finalizer; a second signal does not wait for the time that a first one leaves."""
    run = run_script(LOST.format(name=name, before=before, then=then))
    assert run.returncode == code, run.stderr
    assert run.stderr.splitlines() == [f"firefly: error: {'interrupted' if name == 'SIGINT' else 'ended by SIGTERM'}"]
    wait_for_ends([int(run.stdout)], seconds=20)


IMPORTING = """
import os, sys
from pathlib import Path
from firefly_lightning import interrupts

interrupts.GRACE = 90
sys.path.insert(0, {folder!r})
with interrupts.ends_on_signals("firefly"):
    import unwilling
"""

UNWILLING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(90)
except BaseException:  # an import may hold code that passes nothing on
    time.sleep(90)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_an_import_at_once(name, code, tmp_path):
    (tmp_path / "unwilling.py").write_text(UNWILLING.format(name=name))
    run = run_script(IMPORTING.format(folder=str(tmp_path)))
    assert run.returncode == code, run.stderr
    assert run.stderr.splitlines() == [f"firefly: error: {'interrupted' if name == 'SIGINT' else 'ended by SIGTERM'}"]


def run_script(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
