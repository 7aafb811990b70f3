"""Every strategy that a run can name, one entry each: what registration, export and plans know of it.

This module imports the standard library only, so that the names are known before PyTorch is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

Part = Literal["rows", "layers", "weights", "gradients", "optimizer states"]


@dataclass(frozen=True)
class Engine:
    """The library that does the computing under a strategy.

    Attributes:
        name: The engine's name, which its own checkpoints give as their writer.
        extra: The extra of this package that installs the engine; None where there is nothing to install.
        reader: The module whose ``read_weights`` reads checkpoints in the engine's own form, imported only when one is
            read; None where they are Lightning's plain files.
        keeps_masters: Whether the engine keeps 16-bit weights and float32 masters of them in mixed precision; autocast
            keeps float32 weights only.
        splits_tensors: Whether weights are PyTorch's DTensors, which its optimizers update one by one.
        scales_gradients: Whether the engine can train in precision 16-mixed, which scales the loss.
    """

    name: str
    extra: str | None = None
    reader: str | None = None
    keeps_masters: bool = False
    splits_tensors: bool = False
    scales_gradients: bool = True


@dataclass(frozen=True)
class StrategyEntry:
    """A strategy by its short name.

    Attributes:
        name: The short name, as ``trainer.strategy`` takes it.
        description: One line about the strategy, for Lightning's registry.
        engine: The library that does the computing.
        shards: What the devices share, each holding a part of it; they hold everything else whole.
        memory: Name of the arithmetic in ``planning/memory.py`` that counts the memory of the strategy.
        class_path: Import path of the strategy's class; None where Lightning chooses the class.
        options: Arguments with which the class is made.
        offloads: Whether the states of the optimizer are in host memory.
        name_by: Finds the short name from the arguments of the class, where several short names share one class.
    """

    name: str
    description: str
    engine: Engine
    shards: frozenset[Part]
    memory: Literal["whole", "zero12", "zero3", "gemini", "fsdp", "tensor"]
    class_path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    offloads: bool = False
    name_by: Callable[[Mapping[str, Any]], str] | None = None

    @property
    def class_name(self) -> str:
        """Name of the strategy's class: the last part of the class path."""
        return (self.class_path or "").rpartition(".")[2]

    @property
    def own(self) -> bool:
        """Whether the strategy's class belongs to this project."""
        return (self.class_path or "").startswith("firefly_lightning.")

    @property
    def splits_layers(self) -> bool:
        """Whether devices share each layer and work on the same rows; otherwise they share the rows."""
        return "layers" in self.shards

    @property
    def trains_adapters(self) -> bool:
        """Whether some weights can be trained while all others are frozen."""
        return self.engine in (LIGHTNING, DEEPSPEED) or (self.engine is NATIVE and not self.splits_layers)

    @property
    def whole_weights(self) -> bool:
        """Whether every device holds all weights whole, all the time."""
        return not self.shards & {"weights", "layers"}


def _zero_name(options: Mapping[str, Any]) -> str:
    return f"zero{options.get('stage', 2)}" + ("_offload" if options.get("offload_optimizer") else "")


def _gemini_name(options: Mapping[str, Any]) -> str:
    return "gemini_offload" if options.get("offload_optim_frac") else "gemini"


LIGHTNING = Engine("lightning")
DEEPSPEED = Engine(
    "deepspeed",
    extra="deepspeed",
    reader="firefly_lightning.strategies.deepspeed.checkpoints",
    keeps_masters=True,
)
COLOSSALAI = Engine(
    "colossalai",
    extra="colossalai",
    reader="firefly_lightning.strategies.colossalai.checkpoints",
    keeps_masters=True,
)
NATIVE = Engine(
    "native",
    reader="firefly_lightning.strategies.native.checkpoints",
    splits_tensors=True,
    scales_gradients=False,
)

_ROWS: frozenset[Part] = frozenset({"rows"})
_LAYERS: frozenset[Part] = frozenset({"layers"})
_STATES: frozenset[Part] = _ROWS | {"optimizer states"}
_GRADIENTS: frozenset[Part] = _STATES | {"gradients"}
_ALL: frozenset[Part] = _GRADIENTS | {"weights"}

_CLASSES = "firefly_lightning.strategies."
_zero = partial(
    StrategyEntry, engine=DEEPSPEED, class_path=f"{_CLASSES}deepspeed.strategy.ZeroStrategy", name_by=_zero_name
)
_gemini = partial(
    StrategyEntry, engine=COLOSSALAI, class_path=f"{_CLASSES}colossalai.strategy.GeminiStrategy", name_by=_gemini_name,
    shards=_ALL, memory="gemini",
)  # fmt: skip

CATALOGUE = (
    StrategyEntry("auto", "Lightning's choice: one device", LIGHTNING, frozenset(), "whole"),
    StrategyEntry(
        "ddp", "Every device has the whole model", LIGHTNING, _ROWS, "whole",
        class_path="lightning.pytorch.strategies.DDPStrategy",
    ),
    _zero(
        "zero1", "DeepSpeed, optimizer states sharded",
        shards=_STATES, memory="zero12", options={"stage": 1},
    ),
    _zero(
        "zero2", "DeepSpeed, optimizer states and gradients sharded",
        shards=_GRADIENTS, memory="zero12", options={"stage": 2},
    ),
    _zero(
        "zero3", "DeepSpeed, optimizer states, gradients and weights sharded",
        shards=_ALL, memory="zero3", options={"stage": 3},
    ),
    _zero(
        "zero2_offload", "zero2 with optimizer states in host memory",
        shards=_GRADIENTS, memory="zero12", options={"stage": 2, "offload_optimizer": True}, offloads=True,
    ),
    _zero(
        "zero3_offload", "zero3 with optimizer states and weights in host memory",
        shards=_ALL, memory="zero3", offloads=True,
        options={"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
    _gemini("gemini", "ColossalAI's Gemini, all on the device"),
    _gemini(
        "gemini_offload", "ColossalAI's Gemini, weights and optimizer states on the host",
        options={"offload_optim_frac": 1.0, "offload_param_frac": 1.0}, offloads=True,
    ),
    StrategyEntry(
        "tensor_parallel", "ColossalAI's tensor parallelism", COLOSSALAI, _LAYERS, "tensor",
        class_path=f"{_CLASSES}colossalai.strategy.TensorParallelStrategy",
    ),
    StrategyEntry(
        "fsdp2", "Every process holds a part of every weight (PyTorch's FSDP2)", NATIVE, _ALL, "fsdp",
        class_path=f"{_CLASSES}native.strategy.FSDP2Strategy",
    ),
    StrategyEntry(
        "native_tp", "Processes share each row: PyTorch's tensor parallelism", NATIVE, _LAYERS, "tensor",
        class_path=f"{_CLASSES}native.strategy.NativeTensorParallelStrategy",
    ),
)  # fmt: skip
"""All strategies, in the order of tables and figures."""

BY_NAME = {strategy.name: strategy for strategy in CATALOGUE}

CLASS_PATHS = {strategy.class_name: str(strategy.class_path) for strategy in CATALOGUE if strategy.own}
"""Import paths of this project's strategy classes, by the name of the class."""


def name_of(class_path: str, options: Mapping[str, Any]) -> str:
    """The short name of the strategy with this class and these arguments; the class path where it has no short name."""
    class_name = class_path.rpartition(".")[2]
    found = next((strategy for strategy in CATALOGUE if strategy.class_name == class_name), None)
    if found is None:
        return class_path
    return found.name_by(options) if found.name_by else found.name


def reader_of(engine: object) -> str | None:
    """The module that reads the checkpoints of the engine with this name; None where no such engine is known."""
    return next((strategy.engine.reader for strategy in CATALOGUE if strategy.engine.name == engine), None)
