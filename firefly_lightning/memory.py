"""Memory of a training step by arithmetic: what every strategy holds on a device, at the moments when it holds most.

Sources: Rajbhandari et al. 2020 (ZeRO), where a stage splits states, then gradients, then weights; Zhao et al. 2023
(FSDP); Fang et al. 2021 (PatrickStar, Gemini's chunks); and what the engines in fact keep beside that: DeepSpeed its
buffers and a float32 copy of a process's weights, DDP its buckets, autocast its copies of the weights. The optimizer is
AdamW, dropout is off, as in Bloom's own configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.loss import LOGIT_BYTES

PARTS = ("weights", "master copy", "moments", "gradients", "buffers", "activations", "logits")
"""What memory is taken by; buffers are an engine's own, gathered weights, and working copies of an optimizer's step."""

STRATEGIES = (
    "auto", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "gemini", "gemini_offload",
    "tensor_parallel", "fsdp2", "native_tp",
)  # fmt: skip
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

BUCKET = 200_000_000
"""Numbers in a buffer of DeepSpeed's for gradients, as Lightning sets it."""

REUSED_WITHIN = 1_000_000_000
PREFETCHED = 50_000_000
"""Numbers, by DeepSpeed's defaults: ZeRO-3 keeps gathered weights that it needs again so soon, and gathers ahead."""

CHUNK = 32 * 2**20
"""Numbers in a chunk of Gemini's at least; an eighth of a smaller model."""

Parts = dict[str, float]


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
        """Those of a model's configuration."""
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
        """Unique ones: a tied head counts once; two norms are outside the blocks."""
        heads = 1 if self.tied else 2
        return heads * self.embedding + self.n_layer * self.block + 4 * self.hidden_size


@dataclass(frozen=True)
class Load:
    """What a device works on at a time.

    Attributes:
        tokens: Of a micro-batch, without padding.
        padded: With it, which attention on a GPU computes.
        longest: Of its longest row.
        targets: Its learned tokens.
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
        model: Sizes.
        strategy: One of ``STRATEGIES``.
        devices: Processes, each with a device.
        load: Of a micro-batch.
        micro_batches: That a device takes for an optimizer step.
        precision: One of ``PRECISIONS``.
        checkpointing: Whether activations are recomputed.
        device: On a CPU attention is computed in float32, buffers take what is written to them, and gloo copies what
            it reduces.
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
    def mixed(self) -> bool:
        """Whether products are computed in 16 bits."""
        return self.precision != "32-true"

    @property
    def engine(self) -> bool:
        """Whether an engine keeps 16-bit weights and float32 masters, where PyTorch's autocast keeps float32 only."""
        return self.strategy.startswith(("zero", "gemini")) or self.strategy == "tensor_parallel"

    @property
    def weight_bytes(self) -> int:
        """Of a number of the weights that are computed with, and of a gradient."""
        return 2 if self.mixed and self.engine else 4

    @property
    def split_rows(self) -> bool:
        """Whether devices share the rows; otherwise they share each layer."""
        return not self.strategy.endswith(("_tp", "_parallel"))


@dataclass(frozen=True)
class Estimate:
    """Bytes on a device at the moments of a step that may need most, and on the host.

    Attributes:
        moments: By name, the parts.
        host: Parts that a process keeps in host memory, for its own device.
    """

    moments: Mapping[str, Parts]
    host: Parts

    @property
    def peak_at(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """Those of that moment, in the order of ``PARTS``."""
        return {part: self.moments[self.peak_at].get(part, 0.0) for part in PARTS}

    @property
    def peak(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


def estimate(run: Run) -> Estimate:
    """Memory of a run, from its second step on.

    Raises:
        FireflyError: If a strategy or a precision is not known, or the strategy cannot split the model so.
    """
    check(run)
    plain = {"auto": _whole, "ddp": _whole, "fsdp2": _fsdp, "native_tp": _tensor, "tensor_parallel": _tensor}
    if run.strategy in plain:
        return Estimate(_tidy(plain[run.strategy](run)), {})
    if run.strategy.startswith("gemini"):
        moments, host = _gemini(run)
    else:
        moments, host = _zero3(run) if "3" in run.strategy else _zero12(run)
    return Estimate(_tidy(moments), host)


def check(run: Run) -> None:
    """Refuses what is not known or cannot be.

    Raises:
        FireflyError: If it is such.
    """
    for name, value, known in (("strategy", run.strategy, STRATEGIES), ("precision", run.precision, PRECISIONS)):
        if value not in known:
            raise FireflyError(f"{name} {value} is not one that can be planned; there are {', '.join(known)}")
    if run.strategy == "auto" and run.devices > 1:
        raise FireflyError(f"strategy auto is one device, not {run.devices}; take ddp")
    if not run.split_rows and run.model.n_head % run.devices:
        raise FireflyError(f"{run.strategy}: {run.devices} devices do not divide the model's {run.model.n_head} heads")
    if run.precision == "16-mixed" and run.strategy in ("fsdp2", "native_tp"):
        raise FireflyError(f"{run.strategy}: cannot do precision 16-mixed; take bf16-mixed")


def block_activations(run: Run, tokens: float, padded: float) -> float:
    """Bytes that the gradient of one block needs of its forward pass, without weights.

    Input of both norms, in the type of the residual stream; the normed inputs of two products, queries, keys and
    values, attention's output, the same in packed rows, and what goes into and comes out of GELU: in numbers a token
    2 h of the one and (2 + 3 + 1 + 1 + 4 + 4) h of the other type. In float32 that is 68 h bytes. On the side, mean and
    deviation of two norms and a normaliser of each head.
    """
    model = run.model
    residual = run.weight_bytes
    computed = 2 if run.mixed else 4
    attended = 4 if run.device == "cpu" else computed
    shared = 1 if run.split_rows else run.devices
    hidden = model.hidden_size
    norms = 2 * hidden * (residual + computed) + 4 * residual
    wide = (1 + 4 + 4) * hidden * computed / shared
    attention = (3 + 1) * hidden * attended / shared + 4 * model.n_head / shared
    return tokens * (norms + wide) + padded * attention


def activations(run: Run) -> float:
    """Bytes that stay from the forward pass for the backward pass, without logits.

    The last block goes on from attention with the targets only. Checkpointing keeps the input of each block.
    """
    model, load = run.model, run.load
    hidden, residual = model.hidden_size, run.weight_bytes
    bias = model.n_head * load.longest**2 * (4 if run.device == "cpu" or not run.mixed else 2)
    ends = load.tokens * hidden * residual + 2 * load.targets * hidden * residual + bias
    if run.checkpointing:
        return ends + model.n_layer * load.tokens * hidden * residual
    first = replace(run, load=load)
    whole = (model.n_layer - 1) * block_activations(first, load.tokens, load.padded)
    # Of the last, all tokens go as far as attention: one norm's input and output, queries, keys, values, output.
    computed = 2 if run.mixed else 4
    narrow = block_activations(run, load.targets, 0)
    before = (load.tokens - load.targets) * hidden * (residual + computed)
    attention = block_activations(run, 0, load.padded)
    return ends + whole + narrow + before + attention


def autocast_copies(run: Run) -> float:
    """16-bit copies of the blocks' matrices, which autocast makes and the backward pass needs."""
    if not run.mixed or run.engine:
        return 0.0
    shared = 1 if run.split_rows else run.devices
    return 2.0 * run.model.matrices * (1 if run.checkpointing else run.model.n_layer) / shared


def fused_logits(run: Run) -> float:
    """Bytes of the loss in chunks at its most: logits and their logarithms, or products that make the head's gradient.

    In 16 bits a chunk's product is added to a float32 sum as soon as there is one, and the sum becomes a gradient of
    the weight's type; autocast has a copy of the head too.
    """
    model, targets = run.model, run.load.targets
    chunk = min(max(1, LOGIT_BYTES // (4 * model.vocab_size)), targets)
    logits, several = model.vocab_size * chunk, targets > chunk
    hidden = 2.0 * targets * model.hidden_size * (2 if run.mixed else 4)
    if not run.mixed:
        return hidden + max(8 * logits + 4 * model.embedding * several, 4 * logits + 4 * model.embedding)
    copy = 0 if run.engine else 2 * model.embedding
    products = 6 * logits + (8 if several else 2) * model.embedding
    # A sum of the weight's own type becomes its gradient as it is, another is copied.
    converted = several == run.engine
    gradient = (6 if converted else 4 if several else 2) * model.embedding
    return hidden + copy + max(8 * logits + 4 * model.embedding * several, products, gradient)


def plain_logits(run: Run) -> float:
    """Bytes of all logits at once, in float32: their logarithms, and two gradients while the backward pass begins."""
    return 12.0 * run.model.vocab_size * run.load.targets


def working_set(run: Run) -> float:
    """Bytes that the backward pass of a block takes beside what was kept: gradients of its widest tensors."""
    model, shared = run.model, 1 if run.split_rows else run.devices
    recomputed = block_activations(run, run.load.tokens, run.load.padded) if run.checkpointing else 0.0
    return recomputed + run.load.tokens * model.hidden_size * (8 / shared + 2) * (2 if run.mixed else 4)


def adam_workspace(run: Run, numbers: float, largest: float) -> float:
    """Bytes that PyTorch's unfused AdamW makes in a step: two more of each tensor on a CPU, one of all on a GPU.

    Args:
        run: Gives the device.
        numbers: All that the process updates.
        largest: Of the largest tensor among them.
    """
    return 8 * largest if run.device == "cpu" else 4 * numbers


def _whole(run: Run) -> dict[str, Parts]:
    """One device and DDP. Gradients of a step are freed only after the next forward pass, as Lightning has it."""
    count = run.model.parameters
    held = {"weights": 4.0 * count, "moments": 8.0 * count, "gradients": 4.0 * count}
    # DDP copies gradients into buckets of the same size.
    held["buffers"] = 4.0 * count if run.strategy == "ddp" else 0.0
    step = 4.0 * count if run.precision == "16-mixed" else 0.0  # AdamW is fused but for scaled gradients
    kept = activations(run) + autocast_copies(run)
    return {
        "forward": held | {"activations": kept, "logits": fused_logits(run)},
        "backward": held | {"activations": working_set(run)},
        "step": held | {"buffers": held["buffers"] + step},
    }


def _zero12(run: Run) -> tuple[dict[str, Parts], Parts]:
    """ZeRO 1 and 2: gradients go through buffers, are flattened once more to be reduced, and a share is kept."""
    count, size, share = run.model.parameters, run.weight_bytes, run.model.parameters / run.devices
    states = {"master copy": 4.0 * share, "moments": 8.0 * share}
    largest = float(size * run.model.embedding)
    host = states | {"gradients": 4.0 * share, "buffers": size * share + largest} if "offload" in run.strategy else {}
    held: Parts = {"weights": float(size * count)} | ({} if host else states)
    own = 0.0 if host else float(size * share)
    # Stage 1 accumulates whole gradients, stage 2 a share.
    gathered = 0.0 if run.micro_batches == 1 else float(size * count) if "1" in run.strategy else own
    way_out = largest if host else 0.0  # of a gradient, to the host
    buffers = _written(run, 2 * BUCKET, count) * size + way_out
    reduced = min(BUCKET, count) * size
    step = adam_workspace(run, share, share)
    moments = {
        "forward": held
        | {
            "gradients": gathered,
            "buffers": way_out,
            "activations": activations(run),
            "logits": fused_logits(run),
        },
        "first gradients": held
        | {
            "gradients": gathered,
            "activations": activations(run) + working_set(run),
            "buffers": _written(run, 2 * BUCKET, run.model.block) * size + way_out,
        },
        "reduction": held
        | {
            "gradients": max(gathered, own if count > BUCKET else 0.0),
            "activations": _left(run),
            "buffers": buffers + reduced,
        },
    }
    if not host:
        moments["step"] = held | {"gradients": 4.0 * share, "buffers": step}
    return moments, host


def _zero3(run: Run) -> tuple[dict[str, Parts], Parts]:
    """ZeRO 3: layers are gathered as they are needed, and some stay until they are needed again."""
    count, size, share = run.model.parameters, run.weight_bytes, run.model.parameters / run.devices
    copied = run.mixed or run.device == "cpu"  # on a GPU float32 weights are their own master
    states: Parts = {
        "weights": float(size * share),
        "master copy": 4.0 * share if copied or "offload" in run.strategy else 0.0,
        "moments": 8.0 * share,
        "gradients": float(size * share),
    }
    host = states | {"buffers": 4.0 * share} if "offload" in run.strategy else {}
    held = {} if host else states
    bucket = _written(run, BUCKET, count) * size
    gathered = size * min(count, REUSED_WITHIN // 2 + PREFETCHED)
    copies = 2 if run.device == "cpu" else 1
    reduced = copies * min(BUCKET, count) * size + run.model.embedding * size
    left = _fraction_left(run)
    moments = {
        "forward": held
        | {"buffers": bucket + gathered, "activations": activations(run), "logits": plain_logits(run)},
        "first gradients": held
        | {
            "buffers": bucket + gathered + run.model.embedding * size,
            "activations": activations(run) + working_set(run),
        },
        "reduction": held
        | {"buffers": bucket + reduced + min(gathered, left * size * count), "activations": _left(run)},
    }
    if not host:
        workspace = 4.0 * share + adam_workspace(run, share, share)
        moments["step"] = held | {"buffers": bucket + workspace}
    return moments, host


def _gemini(run: Run) -> tuple[dict[str, Parts], Parts]:
    """Gemini: gradients take the chunks of their weights; a few chunks are whole at a time."""
    count, size, share = run.model.parameters, run.weight_bytes, run.model.parameters / run.devices
    states: Parts = {"weights": float(size * share), "master copy": 4.0 * share, "moments": 8.0 * share}
    chunk = max(min(CHUNK, count / 8), run.model.embedding)
    offloaded = "offload" in run.strategy
    # The chunk at work, the next one, and that whose gradients are reduced; embedding and head are one of them.
    buffers = 3.0 * size * chunk
    gradients = float(size * share) if run.micro_batches > 1 else 0.0
    held = {"buffers": buffers} if offloaded else states | {"buffers": buffers, "gradients": gradients}
    kept = activations(run)
    moments = {
        "forward": held | {"activations": kept, "logits": plain_logits(run)},
        "first gradients": held | {"activations": kept + working_set(run)},
        "step": held,
    }
    return moments, states | {"gradients": gradients} if offloaded else {}


def _fsdp(run: Run) -> dict[str, Parts]:
    """FSDP2: a share of all; two blocks at a time, and embedding, head and last norm all the time, are whole."""
    model, share = run.model, run.model.parameters / run.devices
    held = {"weights": 4.0 * share, "moments": 8.0 * share, "gradients": 4.0 * share}
    gathered = 4.0 * (model.embedding + 2 * model.block)
    # The root's gradient is whole beside its copy that is reduced, and gloo's of that.
    reduced = (3 if run.device == "cpu" else 2) * 4.0 * model.embedding
    kept = activations(run) + autocast_copies(run)
    return {
        "forward": held | {"buffers": gathered, "activations": kept, "logits": plain_logits(run)},
        "backward": held | {"buffers": gathered + reduced, "activations": working_set(run)},
        "step": held | {"buffers": adam_workspace(run, share, model.embedding / run.devices)},
    }


def _tensor(run: Run) -> dict[str, Parts]:
    """Tensor parallelism, by ColossalAI or PyTorch: a share of every matrix; norms and their inputs are whole."""
    model, size = run.model, run.weight_bytes
    whole = model.n_layer * 6 * model.hidden_size + 4 * model.hidden_size  # norms, and biases after a sum
    share = (model.parameters - whole) / run.devices + whole
    held = {"weights": float(size * share), "moments": 8.0 * share, "gradients": float(size * share)}
    held["master copy"] = 4.0 * share if size == 2 else 0.0
    held["buffers"] = float(size * share) if run.engine else 0.0  # ColossalAI puts its model into DDP, with buckets
    kept = activations(run) + autocast_copies(run)
    workspace = adam_workspace(run, share, model.embedding / run.devices)
    return {
        "forward": held | {"activations": kept, "logits": plain_logits(run)},
        "backward": held | {"activations": working_set(run)},
        "step": held | {"buffers": held["buffers"] + workspace},
    }


def _written(run: Run, reserved: float, written: float) -> float:
    """Numbers of a buffer that count: all on a GPU, on a CPU the pages that are written."""
    return min(reserved, written) if run.device == "cpu" else reserved


def _fraction_left(run: Run) -> float:
    """Share of the model whose gradients are still to come when the first full buffer is reduced."""
    return 1 - min(1.0, BUCKET / run.model.parameters)


def _left(run: Run) -> float:
    """Activations at that time."""
    left = _fraction_left(run)
    return left * activations(run) + (working_set(run) if left else 0.0)


def _tidy(moments: dict[str, Parts]) -> dict[str, Parts]:
    return {name: {part: parts[part] for part in PARTS if parts.get(part)} for name, parts in moments.items()}
