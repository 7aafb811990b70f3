"""What a plan is about: the sizes of a model, what a device works on at a time, and how it is trained."""

from dataclasses import dataclass
from typing import Literal

from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.catalogue import BY_NAME, StrategyEntry

STRATEGIES = tuple(BY_NAME)
"""Names of those that can be planned."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a Bloom, by the names of its configuration."""

    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    tied: bool = True

    @classmethod
    def of(cls, config: BloomConfig) -> "ModelSize":
        """Sizes that a model's configuration has."""
        sizes = (config.vocab_size, config.hidden_size, config.n_layer, config.n_head)
        return cls(*sizes, tied=bool(config.tie_word_embeddings))

    @property
    def embedding(self) -> int:
        """Parameters of the word embeddings, and of a head that is tied to them."""
        return self.vocab_size * self.hidden_size

    @property
    def matrices(self) -> int:
        """Parameters of a block's four matrices: 3 + 1 + 4 + 4 times hidden_size squared."""
        return 12 * self.hidden_size**2

    @property
    def block(self) -> int:
        """Parameters of a block: its matrices, their 3 + 1 + 4 + 1 biases, and two norms of two vectors."""
        return self.matrices + 13 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Unique parameters: a tied head counts once; two norms are outside the blocks."""
        heads = 1 if self.tied else 2
        return heads * self.embedding + self.n_layer * self.block + 4 * self.hidden_size


@dataclass(frozen=True)
class Load:
    """What a device works on at a time.

    Attributes:
        tokens: Tokens of a micro-batch, without padding.
        padded: Tokens with padding, which attention on a GPU computes.
        longest: Tokens of its longest row.
        targets: Learned tokens of the micro-batch.
    """

    tokens: int
    padded: int
    longest: int
    targets: int

    @classmethod
    def full(cls, rows: int, length: int) -> "Load":
        """The most that so many rows can be: each of full length, all of it learned."""
        return cls(rows * length, rows * length, length, rows * length)


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        model: Sizes of the model.
        strategy: One of ``STRATEGIES``.
        devices: Processes, each with a device.
        load: What a micro-batch holds.
        micro_batches: Micro-batches that a device takes for an optimizer step.
        precision: One of ``PRECISIONS``.
        checkpointing: Whether activations are recomputed.
        device: Kind of device. On a CPU attention is computed in float32, buffers take what is written to them, and
            gloo copies what it reduces.
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
        """What the catalogue says of the strategy."""
        return BY_NAME[self.strategy]

    @property
    def weight_bytes(self) -> int:
        """Bytes of each number of the weights that are computed with, and of a gradient."""
        return 2 if self.mixed and self.entry.engine.keeps_masters else 4

    @property
    def layer_shares(self) -> int:
        """Devices that share each layer; one has it alone where devices share the rows instead."""
        return self.devices if self.entry.splits_layers else 1


def row_shares(strategy: str, devices: int) -> int:
    """Parts that the rows of a step are divided into: one where devices share each layer, and so see the same rows."""
    return 1 if strategy in BY_NAME and BY_NAME[strategy].splits_layers else devices


def check(run: Run) -> None:
    """Refuses a run that cannot be.

    Raises:
        FireflyError: If strategy or precision is not known, or they do not go with the model or the devices.
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
