"""Optimizers that a run can have, of PyTorch and of packages, and what each of them takes."""

import importlib
from typing import Any

import torch

HAS_MUON = hasattr(torch.optim, "Muon")
"""PyTorch has it since 2.9."""

ELEMENTWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("torch.optim.AdamW", {}),
    "Adam with amsgrad": ("torch.optim.Adam", {"amsgrad": True}),
    "AdamW, foreach": ("torch.optim.AdamW", {"foreach": True}),
    "AdamW, fused": ("torch.optim.AdamW", {"fused": True}),
    "SGD": ("torch.optim.SGD", {}),
    "SGD with momentum": ("torch.optim.SGD", {"momentum": 0.9}),
    "Adagrad": ("torch.optim.Adagrad", {}),
    "RMSprop": ("torch.optim.RMSprop", {"momentum": 0.9}),
    "NAdam": ("torch.optim.NAdam", {}),
    "RAdam": ("torch.optim.RAdam", {}),
    "Adamax": ("torch.optim.Adamax", {}),
    "Adadelta": ("torch.optim.Adadelta", {}),
    "Lion": ("lion_pytorch.Lion", {}),
}
"""By name, the class and arguments of optimizers that update each number by itself, so that weights can be in parts."""

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "Adafactor": ("torch.optim.Adafactor", {}),
    "Adafactor of transformers": ("transformers.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "AdamW of 8 bits": ("bitsandbytes.optim.AdamW8bit", {"min_8bit_size": 512}),
    "Lion of 8 bits": ("bitsandbytes.optim.Lion8bit", {"min_8bit_size": 512}),
    "AdEMAMix of 8 bits": ("bitsandbytes.optim.AdEMAMix8bit", {"min_8bit_size": 512}),
    "AdamW of torchao": ("AdamW8bit", {"block_size": 64}),
    "AdamW of 4 bits": ("AdamW4bit", {"block_size": 64}),
    **({"Muon": ("firefly_lightning.optim.MuonWithAdamW", {"adamw_lr": 1e-3})} if HAS_MUON else {}),
}
"""Optimizers that look at a weight as a whole, or at blocks of it."""

ALL = ELEMENTWISE | WHOLE


def class_of(path: str) -> Any:
    """The class with a path; a bare name is that of one of torchao's, which have moved."""
    if "." not in path:
        try:
            return getattr(importlib.import_module("torchao.optim"), path)
        except ImportError:
            return getattr(importlib.import_module("torchao.prototype.low_bit_optim"), path)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def maker(name: str, lr: float = 1e-2):
    """Makes an optimizer of the name, as a `FireflyModule` takes it."""
    path, arguments = ALL[name]
    return lambda parameters: class_of(path)(parameters, lr=lr, **arguments)
