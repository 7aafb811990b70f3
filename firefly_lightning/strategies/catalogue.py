"""Every strategy that a run can name, one entry each: what registration, export and plans know of it.

Nothing but the standard library is imported, so that names are known long before PyTorch is there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

Part = Literal["rows", "layers", "weights", "gradients", "optimizer states"]


@dataclass(frozen=True)
class Engine:
    """What computes under a strategy.

    Attributes:
        name: That checkpoints in the engine's own form have as their writer's.
        extra: The extra of this package that installs it; None where there is nothing to install.
        reader: Module whose ``read_weights`` reads checkpoints in its own form, imported only then; None where these
            are Lightning's plain files.
        keeps_masters: Whether 16-bit weights with float32 masters are kept in mixed precision, where autocast keeps
            float32 weights only.
        splits_tensors: Whether weights are PyTorch's DTensors, which its optimizers update one by one.
        scales_gradients: Whether precision 16-mixed is possible.
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
        name: What ``trainer.strategy`` calls it.
        description: A line for Lightning's registry.
        engine: What computes.
        shards: What devices have a part of each, where a single device would have all.
        memory: The arithmetic of ``planning/memory.py`` that counts what it holds.
        class_path: Where its class is; None where Lightning chooses.
        options: Arguments of the class.
        offloads: Whether states of the optimizer are in host memory.
        name_by: The short name by arguments of the class, where several names have the same one.
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
        """The last part of the class path."""
        return (self.class_path or "").rpartition(".")[2]

    @property
    def own(self) -> bool:
        """Whether the class is one of this project."""
        return (self.class_path or "").startswith("firefly_lightning.")

    @property
    def splits_layers(self) -> bool:
        """Whether devices share each layer and work on the same rows; otherwise they share the rows."""
        return "layers" in self.shards

    @property
    def whole_weights(self) -> bool:
        """Whether a device holds every weight as a whole, all the time."""
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
"""All of them, in the order of tables and figures."""

BY_NAME = {strategy.name: strategy for strategy in CATALOGUE}

CLASS_PATHS = {strategy.class_name: str(strategy.class_path) for strategy in CATALOGUE if strategy.own}
"""By name, where the classes of this project are."""


def name_of(class_path: str, options: Mapping[str, Any]) -> str:
    """The short name of a class with these arguments; the class path itself where it has none."""
    class_name = class_path.rpartition(".")[2]
    found = next((strategy for strategy in CATALOGUE if strategy.class_name == class_name), None)
    if found is None:
        return class_path
    return found.name_by(options) if found.name_by else found.name


def reader_of(engine: object) -> str | None:
    """Module that reads checkpoints in an engine's own form; None where no engine here has that name."""
    return next((strategy.engine.reader for strategy in CATALOGUE if strategy.engine.name == engine), None)
