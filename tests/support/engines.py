"""Imports engines into the process that ranks are forked from: a rank would need longer for that than for its steps."""

import os
import sys
from importlib import import_module
from unittest import mock

MODULES = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "colossalai.booster", "colossalai.legacy.core")
"""Of both engines, with what they import late; a stack need not have all."""

with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # as in ranks
    for module in MODULES:
        try:
            import_module(module)
        except ImportError:  # of the other stack
            continue
if "deepspeed" in sys.modules:
    from firefly_lightning.strategies.deepspeed.machine import remember_processor

    remember_processor()
    import_module("cpuinfo").get_cpu_info()
