"""A start imports what a run needs, and no more."""

import subprocess
import sys


def test_no_trainer_of_transformers_is_imported():
    # It imports peft and bitsandbytes where they are installed, which takes a fifth of a start.
    code = "import firefly_lightning, sys; print('\\n'.join(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "firefly_lightning.module" in modules
    assert not {"transformers.trainer", "transformers.trainer_utils", "peft", "bitsandbytes"} & set(modules)
