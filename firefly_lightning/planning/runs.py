"""A run to plan: the sizes of its model, what a device works on at a time, and how the model is trained."""

from dataclasses import dataclass
from typing import Literal

from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.catalogue import BY_NAME, StrategyEntry

STRATEGIES = tuple(BY_NAME)
"""Names of the strategies that can be planned."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


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
    """

    model: ModelSize
    strategy: str
    devices: int
    load: Load
    micro_batches: int = 1
    precision: str = "32-true"
    checkpointing: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def attended(self) -> int:
        """Tokens of a micro-batch that attention computes: on a CPU row by row, on a GPU with padding."""
        return self.load.tokens if self.device == "cpu" else self.load.padded

    @property
    def mixed(self) -> bool:
        """Whether products are computed in 16 bits."""
        return self.precision != "32-true"

    @property
    def entry(self) -> StrategyEntry:
        """The strategy's entry in the catalogue of strategies."""
        return BY_NAME[self.strategy]

    @property
    def weight_bytes(self) -> int:
        """Bytes of each number of a gradient, and of the weights that the model computes with."""
        return 2 if self.mixed and self.entry.engine.keeps_masters else 4

    @property
    def layer_shares(self) -> int:
        """Number of devices that share each layer; 1 where devices share the rows instead."""
        return self.devices if self.entry.splits_layers else 1


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
