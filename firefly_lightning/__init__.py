"""Firefly on Lightning: prune Bloom, train it on instruction rows, resume, export, chat."""

import contextlib
import sys

# Where DeepSpeed is installed, transformers imports it, and it logs to standard output, which belongs to answers.
with contextlib.redirect_stdout(sys.stderr):
    from firefly_lightning import strategies
    from firefly_lightning.data.datamodule import FireflyDataModule, Source
    from firefly_lightning.data.plan import StepPlan
    from firefly_lightning.errors import FireflyError
    from firefly_lightning.module import FireflyModule
    from firefly_lightning.moved import OldNames
    from firefly_lightning.prompt import PromptEncoder, PromptFormat

sys.meta_path.insert(0, OldNames())

__version__ = "0.1.0"

__all__ = [
    "FireflyDataModule",
    "FireflyError",
    "FireflyModule",
    "PromptEncoder",
    "PromptFormat",
    "Source",
    "StepPlan",
    "strategies",
]
