"""What counts as a second signal, which leaves no time to tidy up."""

import os
import subprocess
import sys

import pytest

from tests.support.helpers import ROOT

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
    run = subprocess.run(
        [sys.executable, "-c", TIDYING.format(name=name)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert run.returncode == code, run.stderr
    assert run.stdout == "tidied\n"
