"""How a model can be trained on one device with so much memory: ways, best first, and the commands to type."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from firefly_lightning.model.adapters import Lora
from firefly_lightning.planning.optimizers import OptimizerCost, Shapes
from firefly_lightning.planning.planned import Planned
from firefly_lightning.planning.request import Settings
from firefly_lightning.planning.runs import ModelSize, Trained
from firefly_lightning.planning.tables import GIGA, gigabytes, ways_table

RESERVED = 0.5 * GIGA
"""Bytes that CUDA takes for itself on a GPU, and libraries and rows on a CPU."""

ADAFACTOR = OptimizerCost((0.0, 4.0, 4.0, 0.0), (0.0, 4.0), 4.0)
"""PyTorch's Adafactor: a number for each row and each column of a matrix."""

ADAMW_8BIT = OptimizerCost((2048.0, 0.0, 0.0, 2 + 8 / 256), (0.0, 8.0), 0.0)
"""The AdamW of bitsandbytes: two moments of a byte, and a float32 scale of each for 256 numbers."""

OPTIMIZERS = {
    "torch.optim.Adafactor": ADAFACTOR,
    "bitsandbytes.optim.AdamW8bit": ADAMW_8BIT,
}


@dataclass(frozen=True)
class Way:
    """A way to train on one device.

    Attributes:
        name: What is trained, and by what.
        kind: ``all`` for all weights, ``host`` for all weights with the optimizer on the host, or ``adapter``.
        keys: Keys of ``model`` in the configuration, where they are not the defaults.
        precision: Lightning's name of the precision; that of the plan by default.
        strategy: Short name of the strategy.
    """

    name: str
    kind: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    strategy: str = "auto"


_RELEASED = {"release_gradients": True}
_LORA = {"adapter": "lora"}
_8BIT, _FACTORED = ({"optimizer": name} for name in ("bitsandbytes.optim.AdamW8bit", "torch.optim.Adafactor"))
WAYS = (
    Way("all weights, AdamW", "all"),
    Way("all weights, AdamW, gradients released", "all", _RELEASED),
    Way("all weights, AdamW in 8 bits", "all", _8BIT),
    Way("all weights, AdamW in 8 bits, gradients released", "all", _8BIT | _RELEASED),
    Way("all weights, Adafactor", "all", _FACTORED),
    Way("all weights, Adafactor, gradients released", "all", _FACTORED | _RELEASED),
    Way("all weights in 16 bits, AdamW", "all", {}, "bf16-true"),
    Way("all weights in 16 bits, Adafactor", "all", _FACTORED, "bf16-true"),
    Way("all weights in 16 bits, Adafactor, gradients released", "all", _FACTORED | _RELEASED, "bf16-true"),
    Way("all weights, AdamW on the host", "host", {}, None, "zero2_offload"),
    Way("LoRA", "adapter", _LORA),
    Way("LoRA, all in 16 bits", "adapter", _LORA, "bf16-true"),
    Way("LoRA on weights in 8 bits", "adapter", _LORA | {"quantize": "int8"}, "bf16-true"),
    Way("QLoRA: LoRA on weights in 4 bits", "adapter", _LORA | {"quantize": "nf4"}, "bf16-true"),
)
"""Ways to train, best first: exact ones before those that round, those on the device before those on the host."""

ADAPTER_RATE = 2e-4
"""Learning rate of an adapter in the commands: that of Dettmers et al., QLoRA, 2023, table 9."""

REPLACED_RATE = 3e-5
"""Learning rate of another optimizer in the commands: that of AdamW by default."""


def ways(settings: Settings, limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """What each way takes on one device of each memory, with the most rows that fit.

    Rows are recomputed only where nothing fits without.

    Args:
        settings: The configuration, the model and its rows.
        limits: Memory of devices in bytes, by name.

    Returns:
        For each memory and way its ``peak`` and ``host`` in bytes and its ``command``; where nothing fits,
        ``micro_batch_size`` is 0, and the peak is the least.
    """
    lora = lora_shapes(settings.model, Lora().rank)
    found = []
    for way in WAYS:
        if settings.device == "cpu" and way.strategy != "auto":  # its host is the device
            continue
        possible = _possible(_as_way(settings, way, lora), way)
        for text, limit in limits.items():
            if possible:
                found.append({"memory": text, **_chosen(settings, way, possible, limit - RESERVED)})
    return sorted(found, key=lambda one: list(limits).index(one["memory"]))


def lora_shapes(model: ModelSize, rank: int) -> Shapes:
    """How many weights of each shape LoRA has on the four linear layers of every block.

    Args:
        model: Sizes of the model.
        rank: Columns of the one matrix and rows of the other.
    """
    hidden = model.hidden_size
    wide = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    pairs = Counter(shape for inner, outer in wide for shape in ((rank, inner), (outer, rank)))
    return {shape: count * model.n_layer for shape, count in pairs.items()}


def _as_way(settings: Settings, way: Way, lora: Shapes) -> Settings:
    unsaid = settings.fit.trainer.precision is None and settings.device == "cuda"
    precision = way.precision or ("bf16-mixed" if unsaid else settings.precision)
    optimizer = OPTIMIZERS.get(way.keys.get("optimizer", ""))
    if optimizer is ADAFACTOR and precision == "bf16-true":
        optimizer = replace(ADAFACTOR, matrix=(0.0, 2.0, 2.0, 0.0), vector=(0.0, 2.0), workspace=2.0)
    adapter = lora if "adapter" in way.keys else None
    quantize, released = way.keys.get("quantize"), bool(way.keys.get("release_gradients"))
    return replace(settings, precision=precision, trained=Trained(optimizer, adapter, quantize, released))


def _possible(settings: Settings, way: Way) -> list[Planned]:
    """Planned runs of a way, the fastest first: without recomputing, and with the most rows."""
    sizes = sorted(settings.sizes(way.strategy, 1, None), reverse=True)
    runs = (settings.planned(way.strategy, 1, rows, again) for again in (False, True) for rows in sizes)
    return [one for one in runs if one]


def _chosen(settings: Settings, way: Way, possible: Sequence[Planned], limit: float) -> dict[str, Any]:
    fits = next((one for one in possible if one.takes.peak <= limit), None)
    shown = fits or min(possible, key=lambda one: one.takes.peak)
    return {
        "way": way.name,
        "kind": way.kind,
        "precision": shown.run.precision,
        "micro_batch_size": fits.rows if fits else 0,
        "gradient_checkpointing": shown.run.checkpointing,
        "peak": round(shown.takes.peak + RESERVED),
        "host": round(sum(shown.takes.host.values())),
        "command": _command(settings, way, shown),
    }


def _command(settings: Settings, way: Way, planned: Planned) -> str:
    """The command that trains so, with the flags in which it differs from the configuration."""
    own, rows, trainer = settings.fit.model.init_args, settings.fit.data.init_args, settings.fit.trainer
    words: list[object] = ["firefly-fit", "fit", *settings.arguments]
    if not rows.get("train_files"):
        words += ["--data.train_files", "ROWS.jsonl"]
    wanted = {"adapter": None, "quantize": None, "optimizer": None, "release_gradients": False, **way.keys}
    for name, value in (wanted | {"gradient_checkpointing": planned.run.checkpointing}).items():
        if value != (own.get(name) or (False if isinstance(value, bool) else None)):
            words += [f"--model.{name}", {None: "null", True: "true", False: "false"}.get(value, value)]
        if name == "optimizer" and value:
            words += ["--model.optimizer.lr", REPLACED_RATE]
    if way.kind == "adapter" and not own.get("adapter"):
        words += ["--model.learning_rate", ADAPTER_RATE]
    if rows.get("micro_batch_size") != planned.rows:
        words += ["--data.micro_batch_size", planned.rows]
    for name, said, value in (
        ("precision", trainer.precision, planned.run.precision), ("strategy", trainer.strategy, way.strategy),
    ):  # fmt: skip
        if said != value:
            words += [f"--trainer.{name}", value]
    return shlex.join(map(str, [*words, *([] if trainer.devices == 1 else ["--trainer.devices", 1])]))


def print_ways(found: Sequence[dict[str, Any]], device: str) -> None:
    """Prints a table for each memory, and the commands of the best way of each kind that fits."""
    for text in dict.fromkeys(one["memory"] for one in found):
        here = [one for one in found if one["memory"] == text]
        takes = "CUDA" if device == "cuda" else "libraries and rows"
        print(ways_table(here, f"{text} on one device, {gigabytes(RESERVED)} GB of it for {takes}: best first"))
        fits = [one for one in here if one["micro_batch_size"]]
        if not fits:
            least = min(here, key=lambda one: one["peak"])
            print(f"Nothing fits into {text}; the least is {gigabytes(least['peak'])} GB: {least['way']}")
        best_of_kind: dict[str, dict[str, Any]] = {}
        for one in fits:
            best_of_kind.setdefault(one["kind"], one)
        for best in best_of_kind.values():
            print(f"{best['way']}:\n  {best['command']}")
        print()
