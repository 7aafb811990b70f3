"""Computes the memory of a training step: what each strategy holds on a device at the moments when it holds most.

Sources: Rajbhandari et al. 2020 (ZeRO), where a stage splits states, then gradients, then weights; Zhao et al. 2023
(FSDP); Fang et al. 2021 (PatrickStar, Gemini's chunks). Beyond these it counts what the engines keep in practice:
DeepSpeed its buffers and a float32 copy of a process's weights, DDP its buckets, autocast its copies of the weights.
Dropout is off, as in Bloom's own configuration. What an optimizer keeps, trial steps tell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from firefly_lightning.planning.activations import (
    activations,
    autocast_copies,
    dequantized,
    fused_logits,
    plain_logits,
    working_set,
)
from firefly_lightning.planning.runs import Run, check

PARTS = ("weights", "master copy", "moments", "gradients", "buffers", "activations", "logits")
"""Parts of memory. Buffers are those of an engine, gathered weights, and working copies of an optimizer's step."""

BUCKET = 200_000_000
"""Numbers that a buffer of DeepSpeed for gradients holds, as Lightning sets it."""

REUSED_WITHIN = 1_000_000_000
"""ZeRO-3 keeps gathered weights that it uses again before so many other numbers, by DeepSpeed's default."""

PREFETCHED = 50_000_000
"""Numbers of weights that ZeRO-3 gathers ahead, by DeepSpeed's default."""

CHUNK = 32 * 2**20
"""Numbers that a chunk of Gemini holds at least; for a smaller model, an eighth of its parameters."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """Memory on a device, at the moments of a step that may need most, and on the host.

    Attributes:
        moments: Bytes of each part on the device, by the name of the moment.
        host: Bytes of each part that a process keeps in host memory.
    """

    moments: Mapping[str, Parts]
    host: Parts

    @property
    def peak_at(self) -> str:
        """Name of the moment that needs most memory on the device."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """Bytes of each part on the device at the moment that needs most."""
        return self.moments[self.peak_at]

    @property
    def peak(self) -> float:
        """Bytes on the device at the moment that needs most."""
        return sum(self.parts.values())


def estimate(run: Run) -> Estimate:
    """Computes the memory of a run, from its second step on.

    Raises:
        FireflyError: If strategy or precision is not known, or the strategy cannot split the model over these devices.
    """
    check(run)
    moments, host = _ARITHMETIC[run.entry.memory](run)
    if run.copies_saves:
        host = host | {"checkpoint": saved(run)}
    return Estimate({name: {part: parts.get(part, 0.0) for part in PARTS} for name, parts in moments.items()}, host)


def saved(run: Run) -> float:
    """Bytes that a process saves: trained weights, or their masters, and what the optimizer keeps of them.

    One process saves all of it where each has it, and otherwise each process an equal share of the tensors.
    """
    size = 2 if run.precision == "bf16-true" else 4
    processes = 1 if run.entry.memory == "whole" else run.devices
    return (size * run.count + run.optimizer.states(run.shapes)) / processes


def adam_workspace(run: Run, numbers: float, largest: float) -> float:
    """Bytes that PyTorch's unfused AdamW takes for a step: two copies of one tensor at a time, or one of all at once.

    Args:
        run: The run. PyTorch takes tensors one by one on a CPU, and DTensors on a GPU too.
        numbers: Numbers that the process updates.
        largest: Numbers of the largest tensor among them.
    """
    one_by_one = run.device == "cpu" or run.entry.engine.splits_tensors
    return 8 * largest if one_by_one else 4 * numbers


def _whole(run: Run) -> tuple[dict[str, Parts], Parts]:
    """One device, and DDP. Lightning frees the gradients of a step only after the next forward pass."""
    count, size, optimizer = run.count, run.weight_bytes, run.optimizer
    own = size if not run.frozen or run.precision == "bf16-true" else 4
    held = {"weights": own * count + run.frozen_bytes, "moments": optimizer.states(run.shapes)}
    gradients = float(own * count)
    # DDP copies gradients into buckets of the same size.
    held["buffers"] = gradients if "rows" in run.entry.shards else 0.0
    together = optimizer.together and run.device == "cuda" and not run.trained.releases
    step = optimizer.workspace * (count if together else run.largest)
    if run.precision == "16-mixed" and run.trained.optimizer is None:
        step = 4.0 * count  # AdamW is fused unless gradients are scaled
    kept = activations(run) + autocast_copies(run) + dequantized(run)
    if run.trained.releases:
        # The head's gradient is there from the end of the forward pass on, that of a block's matrix for a moment.
        arriving = float(size * (run.model.embedding + 4 * run.model.hidden_size**2))
        return {
            "forward": held | {"activations": kept, "logits": fused_logits(run)},
            "backward": held
            | {"gradients": arriving, "activations": kept + working_set(run), "buffers": held["buffers"] + step},
        }, {}
    held["gradients"] = gradients
    moments = {
        "forward": held | {"activations": kept, "logits": fused_logits(run)},
        "backward": held | {"activations": working_set(run)},
        "step": held | {"buffers": held["buffers"] + step},
    }
    if run.frozen:  # activations outweigh gradients, which are small: the backward pass begins with all of both
        moments["backward"] = held | {"activations": kept + working_set(run)}
    return moments, {}


def _zero12(run: Run) -> tuple[dict[str, Parts], Parts]:
    """ZeRO 1 and 2. Gradients go through buffers, are flattened again to be reduced, and a share of them is kept."""
    count, size, share = run.count, run.weight_bytes, run.count / run.devices
    states = {"master copy": 4.0 * share, "moments": _moments(run)}
    largest = float(size * run.largest)
    host: Parts = {}
    if run.entry.offloads:
        summed = size * share if run.micro_batches > 1 else 0.0
        host = states | {"gradients": 4.0 * share + summed, "buffers": size * share + largest}
    held: Parts = {"weights": size * count + run.frozen_bytes} | ({} if host else states)
    own = 0.0 if host else float(size * share)
    # Stage 1 accumulates whole gradients, stage 2 a share of them.
    gathered = 0.0 if run.micro_batches == 1 else own if "gradients" in run.entry.shards else float(size * count)
    way_out = largest if host else 0.0  # the copy of a gradient that goes to the host
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
    """ZeRO 3. Layers are gathered as they are needed, and some stay whole until they are needed again."""
    count, size, share = run.count, run.weight_bytes, run.count / run.devices
    copied = run.mixed or run.device == "cpu"  # float32 weights on a GPU are their own masters
    states: Parts = {
        "weights": size * share + run.frozen_bytes / run.devices,
        "master copy": 4.0 * share if copied or run.entry.offloads else 0.0,
        "moments": _moments(run),
        "gradients": float(size * share),
    }
    host = states | {"buffers": 4.0 * share} if run.entry.offloads else {}
    held = {} if host else states
    bucket = _written(run, BUCKET, count) * size
    gathered = size * min(run.model.parameters, REUSED_WITHIN // 2 + PREFETCHED)
    copies = 2 if run.device == "cpu" else 1
    reduced = copies * min(BUCKET, count) * size + run.largest * size
    left = _fraction_left(run)
    moments = {
        "forward": held | {"buffers": bucket + gathered, "activations": activations(run), "logits": plain_logits(run)},
        "first gradients": held
        | {
            "buffers": bucket + gathered + run.largest * size,
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
    """Gemini. Gradients are put into the chunks of their weights; a few chunks are whole at a time."""
    count, size, share = run.model.parameters, run.weight_bytes, run.model.parameters / run.devices
    states: Parts = {"weights": float(size * share), "master copy": 4.0 * share, "moments": _moments(run)}
    chunk = max(min(CHUNK, count / 8), run.model.embedding)
    # Whole chunks: one in use, the next, and one whose gradients are reduced; embedding and head are one chunk.
    buffers = 3.0 * size * chunk
    gradients = float(size * share) if run.micro_batches > 1 else 0.0
    held = {"buffers": buffers} if run.entry.offloads else states | {"buffers": buffers, "gradients": gradients}
    kept = activations(run)
    moments = {
        "forward": held | {"activations": kept, "logits": plain_logits(run)},
        "first gradients": held | {"activations": kept + working_set(run)},
        "step": held,
    }
    return moments, states | {"gradients": gradients} if run.entry.offloads else {}


def _fsdp(run: Run) -> tuple[dict[str, Parts], Parts]:
    """FSDP2. A device has a share of all; two blocks are whole at a time, and embedding, head and last norm always."""
    model, share = run.model, run.count / run.devices
    held = {"weights": 4.0 * share + run.frozen_bytes / run.devices, "moments": _moments(run), "gradients": 4.0 * share}
    root = 4.0 * model.embedding
    gathered = root + 8.0 * model.block
    # At the end the root's gradient is whole, beside a copy that is reduced and, on a CPU, gloo's copy.
    reduced = (4 if run.device == "cpu" else 3) * root - root / run.devices
    kept = activations(run) + autocast_copies(run)
    moments = {
        "forward": held | {"buffers": gathered, "activations": kept, "logits": plain_logits(run)},
        "backward": held | {"buffers": reduced, "activations": working_set(run)},
        "step": held | {"buffers": adam_workspace(run, share, model.embedding / run.devices)},
    }
    return moments, {}


def _tensor(run: Run) -> tuple[dict[str, Parts], Parts]:
    """Tensor parallelism, by ColossalAI or PyTorch: shares of every matrix; norms and their inputs are whole."""
    model, size = run.model, run.weight_bytes
    whole = model.n_layer * 6 * model.hidden_size + 4 * model.hidden_size  # norms, and biases after a sum
    share = (model.parameters - whole) / run.devices + whole
    split = share / model.parameters  # of each weight, but for norms
    held = {
        "weights": float(size * share),
        "moments": run.optimizer.states(run.shapes) * split,
        "gradients": float(size * share),
    }
    held["master copy"] = 4.0 * share if size == 2 else 0.0
    # ColossalAI puts its model into DDP, which keeps buckets.
    held["buffers"] = float(size * share) if run.entry.engine.keeps_masters else 0.0
    kept = activations(run) + autocast_copies(run)
    workspace = adam_workspace(run, share, model.embedding / run.devices)
    moments = {
        "forward": held | {"activations": kept, "logits": plain_logits(run)},
        "backward": held | {"activations": working_set(run)},
        "step": held | {"buffers": held["buffers"] + workspace},
    }
    return moments, {}


def _moments(run: Run) -> float:
    """Bytes of a device's share of the optimizer's states; those of an engine's masters are float32."""
    return run.optimizer.states(run.shapes) / run.devices


def _written(run: Run, reserved: float, written: float) -> float:
    """How many numbers of a reserved buffer take memory: on a GPU all, on a CPU those that are written."""
    return min(reserved, written) if run.device == "cpu" else reserved


def _fraction_left(run: Run) -> float:
    """Share of the model whose gradients are still to come when the first full buffer is reduced."""
    return 1 - min(1.0, BUCKET / run.model.parameters)


def _left(run: Run) -> float:
    """Bytes of activations when the first full buffer of gradients is reduced."""
    left = _fraction_left(run)
    return left * activations(run) + (working_set(run) if left else 0.0)


_ARITHMETIC: dict[str, Callable[[Run], tuple[dict[str, Parts], Parts]]] = {
    "whole": _whole,
    "zero12": _zero12,
    "zero3": _zero3,
    "gemini": _gemini,
    "fsdp": _fsdp,
    "tensor": _tensor,
}
"""Functions that compute memory, by the names that the catalogue of strategies has for them."""
