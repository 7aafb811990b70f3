"""A run to plan: the sizes of its model, what a device works on at a time, and how the model is trained."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import Quantize
from firefly_lightning.planning.optimizers import OptimizerCost, Shapes, adamw
from firefly_lightning.strategies.catalogue import BY_NAME, StrategyEntry

STRATEGIES = tuple(BY_NAME)
"""Names of the strategies that can be planned."""

QUANTIZED: dict[Quantize | None, float] = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a number of a quantised matrix; 64 numbers in 4 bits have a float32 scale, and so has a row in 8 bits."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a Bloom, named as in its configuration; ``tied`` says whether embedding and head share weights."""

    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    tied: bool = True

    @classmethod
    def of(cls, config: BloomConfig) -> "ModelSize":
        """Takes the sizes from a model's configuration."""
        sizes = (config.vocab_size, config.hidden_size, config.n_layer, config.n_head)
        return cls(*sizes, tied=bool(config.tie_word_embeddings))

    @property
    def embedding(self) -> int:
        """Number of parameters of the word embeddings, which a tied head shares."""
        return self.vocab_size * self.hidden_size

    @property
    def matrices(self) -> int:
        """Number of parameters of a block's four matrices: 3 + 1 + 4 + 4 times hidden_size squared."""
        return 12 * self.hidden_size**2

    @property
    def block(self) -> int:
        """Number of parameters of a block: its matrices, their 3 + 1 + 4 + 1 biases, and two norms of two vectors."""
        return self.matrices + 13 * self.hidden_size

    @property
    def shapes(self) -> Shapes:
        """How many weights of each shape the model has; its biases and norms are counted as one vector."""
        hidden = self.hidden_size
        wide = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
        shapes: Counter[tuple[int, ...]] = Counter({(self.vocab_size, hidden): 1 if self.tied else 2})
        return shapes + Counter(dict.fromkeys(wide, self.n_layer)) + Counter({((13 * self.n_layer + 4) * hidden,): 1})

    @property
    def parameters(self) -> int:
        """Number of parameters of the model; a tied head is not counted again, and two norms are outside the blocks."""
        heads = 1 if self.tied else 2
        return heads * self.embedding + self.n_layer * self.block + 4 * self.hidden_size


@dataclass(frozen=True)
class Load:
    """A micro-batch: what a device works on at a time.

    Attributes:
        tokens: Tokens of the micro-batch, without padding.
        padded: Tokens of the micro-batch with padding, which attention on a GPU computes.
        longest: Tokens of the longest row.
        targets: Learned tokens of the micro-batch.
    """

    tokens: int
    padded: int
    longest: int
    targets: int

    @classmethod
    def full(cls, rows: int, length: int) -> "Load":
        """The largest micro-batch of ``rows`` rows: each has ``length`` tokens, all of them learned."""
        return cls(rows * length, rows * length, length, rows * length)


@dataclass(frozen=True)
class Trained:
    """What of a model is trained, and by which optimizer.

    Attributes:
        optimizer: Memory of the optimizer; None for this project's AdamW.
        adapter: How many weights of each shape an adapter has; None where all weights are trained.
        quantize: How the frozen weights of the blocks' linear layers are kept.
        releases: Whether each weight is updated as its gradient arrives, so that gradients are not kept.
    """

    optimizer: OptimizerCost | None = None
    adapter: Shapes | None = None
    quantize: Quantize | None = None
    releases: bool = False


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        model: Sizes of the model.
        strategy: One of ``STRATEGIES``.
        devices: Number of processes, each with one device.
        load: Tokens of a micro-batch.
        micro_batches: Micro-batches that a device takes for an optimizer step.
        precision: One of ``PRECISIONS``.
        checkpointing: Whether activations are recomputed.
        device: Kind of device. On a CPU attention is computed in float32, buffers take only the memory that is written
            to, and gloo copies what it reduces.
        trained: What of the model is trained.
        copies_saves: Whether checkpoints are copied in host memory, to be written while the training goes on.
    """

    model: ModelSize
    strategy: str
    devices: int
    load: Load
    micro_batches: int = 1
    precision: str = "32-true"
    checkpointing: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    trained: Trained = field(default_factory=Trained)
    copies_saves: bool = False

    @property
    def attended(self) -> int:
        """Tokens of a micro-batch that attention computes: on a CPU row by row, on a GPU with padding."""
        return self.load.tokens if self.device == "cpu" else self.load.padded

    @property
    def mixed(self) -> bool:
        """Whether products are computed in 16 bits, and weights are kept in 32."""
        return self.precision.endswith("-mixed")

    @property
    def computed_bytes(self) -> int:
        """Bytes of each number that a product gives."""
        return 4 if self.precision == "32-true" else 2

    @property
    def entry(self) -> StrategyEntry:
        """The strategy's entry in the catalogue of strategies."""
        return BY_NAME[self.strategy]

    @property
    def weight_bytes(self) -> int:
        """Bytes of each number of a gradient, and of the weights that the model computes with."""
        half = self.precision == "bf16-true" or (self.mixed and self.entry.engine.keeps_masters)
        return 2 if half else 4

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights are frozen, and only an adapter is trained."""
        return self.trained.adapter is not None

    @property
    def shapes(self) -> Shapes:
        """How many of the weights that are trained have each shape."""
        return self.model.shapes if self.trained.adapter is None else self.trained.adapter

    @property
    def count(self) -> int:
        """Number of parameters that are trained."""
        return self.model.parameters if self.trained.adapter is None else numbers(self.trained.adapter)

    @property
    def largest(self) -> int:
        """Numbers of the largest weight that is trained."""
        return max(map(math.prod, self.shapes))

    @property
    def frozen_bytes(self) -> float:
        """Bytes of the weights of the whole model that are frozen."""
        if not self.frozen:
            return 0.0
        matrices = self.model.matrices * self.model.n_layer
        # autocast's type is that in which plain matrices under an adapter are kept, where no engine has its own.
        plain = 2 if self.entry.engine.name == "lightning" else self.weight_bytes
        size = {None: min(self.computed_bytes, plain) if self.mixed else self.weight_bytes, **QUANTIZED}
        return size[self.trained.quantize] * matrices + self.weight_bytes * (self.model.parameters - matrices)

    @property
    def optimizer(self) -> OptimizerCost:
        """Memory of the optimizer; engines with masters keep its states in float32."""
        return self.trained.optimizer or adamw(2 if self.precision == "bf16-true" else 4)

    @property
    def layer_shares(self) -> int:
        """Number of devices that share each layer; 1 where devices share the rows instead."""
        return self.devices if self.entry.splits_layers else 1


def numbers(shapes: Shapes) -> int:
    """Numbers of all weights of these shapes."""
    return sum(count * math.prod(shape) for shape, count in shapes.items())


def row_shares(strategy: str, devices: int) -> int:
    """Number of parts that the rows of a step are divided into; 1 where devices share each layer, and so all rows."""
    return 1 if strategy in BY_NAME and BY_NAME[strategy].splits_layers else devices


def check(run: Run) -> None:
    """Refuses a run that is not possible.

    Raises:
        FireflyError: If strategy or precision is not known, or does not fit the model or the number of devices.
    """
    for name, value, known in (("strategy", run.strategy, STRATEGIES), ("precision", run.precision, PRECISIONS)):
        if value not in known:
            raise FireflyError(f"{name} {value} is not one that can be planned; there are {', '.join(known)}")
    if run.strategy == "auto" and run.devices > 1:
        raise FireflyError(f"strategy auto is one device, not {run.devices}; take ddp")
    if run.entry.splits_layers and run.model.n_head % run.devices:
        raise FireflyError(f"{run.strategy}: {run.devices} devices do not divide the model's {run.model.n_head} heads")
    if run.precision == "16-mixed" and not run.entry.engine.scales_gradients:
        raise FireflyError(f"{run.strategy}: cannot do precision 16-mixed; take bf16-mixed")
    _check_trained(run)


def _check_trained(run: Run) -> None:
    entry, trained = run.entry, run.trained
    if run.frozen and not entry.trains_adapters:
        raise FireflyError(f"{run.strategy}: trains all weights only, no adapter")
    if trained.quantize and not run.frozen:
        raise FireflyError(f"model.quantize {trained.quantize}: quantised weights cannot be trained; set model.adapter")
    if trained.quantize and not entry.whole_weights:
        raise FireflyError(f"{run.strategy}: shards weights, and quantised ones must be whole")
    if trained.releases and (run.strategy != "auto" or run.micro_batches > 1):
        raise FireflyError("model.release_gradients: takes one device, and one micro-batch a step")
    if run.precision == "bf16-true" and run.strategy not in ("auto", "ddp"):
        raise FireflyError(f"{run.strategy}: precision bf16-true is planned for auto and ddp only; take bf16-mixed")
