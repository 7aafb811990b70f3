"""How fast a run trains, what it waits for, and how well it uses its device."""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from transformers import BloomConfig

from firefly_lightning.data.batches import data_parallel_share
from firefly_lightning.errors import check_number

_WEIGHTS = {"query_key_value": 3, "dense": 1, "dense_h_to_4h": 4, "dense_4h_to_h": 4}
"""Weights of the matrices of a block, in units of hidden_size², by the names of their layers."""

PRODUCT_SECONDS = 0.01
"""A matrix product that takes this many seconds is large enough to show what a device can do."""


class Throughput(Callback):
    """Logs the speed of every optimizer step, over the time since the last step ended; validation is not in it.

    ``target_tokens_per_second`` counts the learned tokens of the step, over all ranks. The other metrics are those of
    the first rank: ``data_wait`` is the share of the time that it waited for its next micro-batches, between 0 and 1;
    ``memory_gb`` is the most memory that it has had on its GPU, or on a CPU in all, in 10⁹ bytes; ``mfu`` is its model
    FLOPs utilisation, what :func:`training_flops` counts against the peak of the device, between 0 and 1.

    A metric is left out where the batch or the loader does not give what it needs: ``FireflyDataModule`` gives
    ``step_target_tokens``, ``lengths`` and ``seconds_waited``.

    Args:
        peak_tflops: Peak of a device, in 10¹² floating-point operations a second, as its maker states it for the
            precision of the run; by default, matrix products measure it when training starts.

    Raises:
        FireflyError: If the peak is not above 0.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        check_number("throughput.peak_tflops", peak_tflops, above=0)
        self.peak_tflops = peak_tflops
        self._peak = 0.0
        self._since: float | None = None
        self._waited = 0.0
        self._flops = 0.0
        self._frozen = ALL_TRAINED

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the peak of the device and what of the model is frozen, and starts the clock."""
        dtype = _compute_dtype(trainer.precision)
        self._peak = 1e12 * self.peak_tflops if self.peak_tflops else measure_peak(trainer.strategy.root_device, dtype)
        self._frozen = frozen_of(pl_module)
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the metrics of a step when the micro-batch was the last of it."""
        told = batch if isinstance(batch, dict) else {}
        config = getattr(getattr(pl_module, "model", None), "config", None)
        if isinstance(config, BloomConfig) and "lengths" in told:
            lengths = getattr(pl_module, "computed_lengths", _lengths)(told)
            self._flops += training_flops(config, lengths, len(told["target_ids"]), self._frozen)
        if (batch_idx + 1) % trainer.accumulate_grad_batches or self._since is None:
            return
        seconds = time.perf_counter() - self._since
        if "step_target_tokens" in told:
            pl_module.log("target_tokens_per_second", told["step_target_tokens"] / seconds)
        if (waited := _seconds_waited(trainer)) is not None:
            pl_module.log("data_wait", (waited - self._waited) / seconds)
        pl_module.log("memory_gb", _most_memory(trainer.strategy.root_device) / 1e9)
        if self._flops:
            sharing = trainer.world_size / data_parallel_share(trainer.strategy)[0]  # ranks that split each row
            pl_module.log("mfu", self._flops / (seconds * sharing * self._peak))
        self._start(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again: validation is not training time."""
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self._since, self._waited, self._flops = time.perf_counter(), _seconds_waited(trainer) or 0.0, 0.0


class Frozen(NamedTuple):
    """What of a Bloom is not trained, so that its gradient is not computed.

    Attributes:
        matrices: Weights of the frozen matrices of all blocks, in units of hidden_size².
        head: Whether the head is frozen.
    """

    matrices: int = 0
    head: bool = False


ALL_TRAINED = Frozen()


def frozen_of(model: nn.Module) -> Frozen:
    """What of a Bloom, or of a module around one, is frozen; an adapter's own weights are no part of it."""
    matrices, head = 0, False
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        if not weight.requires_grad:
            matrices += _WEIGHTS.get(layer, 0)
            head = head or layer == "word_embeddings"
    return Frozen(matrices, head)


def training_flops(config: BloomConfig, lengths: Sequence[int], targets: int, frozen: Frozen = ALL_TRAINED) -> float:
    """Floating-point operations that training on rows needs, forward and backward.

    The formula is that of Chowdhery and others, "PaLM" (2022), appendix B: 6 operations for each token and weight of a
    matrix, and 12 · layers · hidden_size · length for the attention of a token. A frozen weight has 2 operations less,
    those of its gradient; the narrow matrices of an adapter do not count. The head counts only where there is a target,
    since it is needed nowhere else. Padding and what checkpointing computes again do not count.

    Args:
        config: Configuration of the model.
        lengths: Number of tokens of each row.
        targets: Number of learned tokens of all rows together.
        frozen: What is not trained.
    """
    hidden, layers = config.hidden_size, config.n_layer
    # A block's matrices have 12 · hidden² weights: 4 in attention, 8 in the wide layers.
    blocks = (6 * 12 * layers - 2 * frozen.matrices) * hidden**2 * sum(lengths)
    attention = 12 * layers * hidden * sum(length**2 for length in lengths)
    return float(blocks + attention + (4 if frozen.head else 6) * config.vocab_size * hidden * targets)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the fastest of a few matrix products; takes some hundredths of a second."""
    size, best, took = 128, 0.0, 0.0
    while took < PRODUCT_SECONDS and size <= 8192:
        size *= 2
        matrix = torch.ones(size, size, device=device, dtype=dtype)  # random values would move the run's random state
        took = min(_time_product(matrix) for _ in range(3))
        best = max(best, 2 * size**3 / took)
    return best


def _time_product(matrix: torch.Tensor) -> float:
    _wait_for(matrix.device)
    start = time.perf_counter()
    matrix @ matrix
    _wait_for(matrix.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compute_dtype(precision: Any) -> torch.dtype:
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return kinds.get(str(precision).split("-")[0], torch.float32)


def _most_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _lengths(batch: Any) -> list[int]:
    lengths: list[int] = batch["lengths"]
    return lengths


def _seconds_waited(trainer: L.Trainer) -> float | None:
    return getattr(trainer.train_dataloader, "seconds_waited", None)
