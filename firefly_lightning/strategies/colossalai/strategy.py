"""ColossalAI's Gemini and its tensor parallelism: ``gemini``, ``gemini_offload``, ``tensor_parallel``.

They need ColossalAI, which the extra ``colossalai`` installs and which is imported only when one of them is used.

Longer than 300 lines, since the two classes are read side by side: each hook of one has its twin.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import AdamW, Optimizer
from transformers import BloomConfig, BloomForCausalLM
from typing_extensions import override

from firefly_lightning.checkpoints.portable import PortableReader, States
from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.colossalai import padded_vocabulary
from firefly_lightning.strategies.colossalai.booster import BoosterStrategy

MEBI = 2**20


class GeminiStrategy(BoosterStrategy):
    """Gemini keeps weights, gradients and moments in chunks, spread over processes and between device and host.

    Args:
        placement_policy: ``static`` places chunks by the fractions below; ``auto`` moves chunks to the host when the
            device is full.
        shard_param_frac: Share of the weights that processes hold in parts between uses, from 0 (all whole) to 1.
        offload_optim_frac: Share of masters, gradients and moments that stay on the host, from 0 to 1.
        offload_param_frac: Share of the weights that stay on the host; it needs the other two fractions to be 1.
        min_chunk_size_m: Weights that a chunk holds at least, in units of 2^20; by default 32, or an eighth of a
            smaller model.
        tp_size: Only 1 is allowed, since ColossalAI's Gemini computes wrong gradients with tensor parallelism.
        simulated_memory_gb: GB of memory of the device that a CPU simulates, for ``auto``; all there is by default.
        plugin_options: Further options of ColossalAI's ``GeminiPlugin``, by name.
        process_group_backend: Backend of the process group, such as nccl; by default the usual one of the device.
        timeout: Time after which a collective operation fails.

    Raises:
        FireflyError: If ColossalAI is not installed, or the arguments contradict each other.
    """

    name = "gemini"
    generates_in_step = True
    own_options = frozenset(
        {
            "placement_policy", "shard_param_frac", "offload_optim_frac", "offload_param_frac", "min_chunk_size_m",
            "precision", "max_norm", "norm_type", "tp_size", "enable_gradient_accumulation", "force_outputs_fp32",
        }
    )  # fmt: skip

    def __init__(
        self,
        placement_policy: Literal["static", "auto"] = "static",
        shard_param_frac: float = 1.0,
        offload_optim_frac: float = 0.0,
        offload_param_frac: float = 0.0,
        min_chunk_size_m: float | None = None,
        tp_size: int = 1,
        simulated_memory_gb: float | None = None,
        plugin_options: dict[str, Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(plugin_options, process_group_backend, timeout)
        self.placement_policy = placement_policy
        self.fractions = {
            "shard_param_frac": shard_param_frac,
            "offload_optim_frac": offload_optim_frac,
            "offload_param_frac": offload_param_frac,
        }
        self.min_chunk_size_m = min_chunk_size_m
        self.simulated_memory = int(simulated_memory_gb * 1e9) if simulated_memory_gb else None
        self._check_arguments(tp_size)

    @property
    def evaluates_first(self) -> bool:  # type: ignore[override]
        """False where the engine learns from the first training step what fits on the device."""
        return self.placement_policy != "auto"

    @override
    def plugin_class(self) -> Any:
        from firefly_lightning.strategies.colossalai.fixes import FixedGeminiPlugin

        return FixedGeminiPlugin

    @override
    def options(self, config: BloomConfig) -> dict[str, Any]:
        count = sum(parameter.numel() for parameter in self.bloom.parameters())
        # A model that fits into one chunk is not sharded at all, and accumulates wrong gradients.
        least = min(self.min_chunk_size_m * MEBI, count) if self.min_chunk_size_m else min(32 * MEBI, count / 8)
        return {
            **self._placement(),
            "enable_gradient_accumulation": self.fitting and self.trainer.accumulate_grad_batches > 1,
            "master_weights": self.fitting,
            "min_chunk_size_m": least / MEBI,
            "search_range_m": min(32, least / MEBI),
            "hidden_dim": config.hidden_size,
            # Both need CUDA: the first its streams, the second its pinned memory.
            "enable_async_reduce": not self.simulated,
            "pin_memory": not self.simulated,
        }

    @override
    def check_options(self) -> None:
        super().check_options()
        if self.simulated and self.plugin_options.get("gpu_margin_mem_ratio"):
            raise FireflyError("gemini: plugin_options.gpu_margin_mem_ratio needs a GPU; leave it out of a dry run")

    @override
    def setup(self, trainer: L.Trainer) -> None:
        if not self.evaluates_first:
            trainer.num_sanity_val_steps = 0
        super().setup(trainer)

    @override
    def adapt(self, bloom: BloomForCausalLM) -> None:
        bloom.lm_head.register_forward_hook(_plain_output)
        collector = self.wrapper.gemini_manager._mem_stats_collector
        if self.simulated and collector:
            from firefly_lightning.strategies.colossalai.simulated_device import NoActivations

            collector._mem_monitor = NoActivations()

    @override
    def convert_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Turns Adam or AdamW into ColossalAI's ``HybridAdam``, which steps both on the device and on the host."""
        from colossalai.nn.optimizer import CPUAdam, FusedAdam, HybridAdam

        if type(optimizer) in (HybridAdam, CPUAdam, FusedAdam):
            return optimizer
        self.check_adam(optimizer)
        names = ("params", "lr", "betas", "eps", "weight_decay")
        groups = [{name: group[name] for name in names} for group in optimizer.param_groups]
        decoupled = isinstance(optimizer, AdamW) or optimizer.defaults.get("decoupled_weight_decay", False)
        converted: Optimizer = HybridAdam(groups, adamw_mode=decoupled)
        return converted

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        with contextlib.redirect_stdout(sys.stderr):  # `auto` prints figures of its memory
            return super().backward(*args, **kwargs)

    @override
    def step_norm(self, optimizer: Any) -> float:
        return float(optimizer.gradient_norm)

    @override
    def full_precision(self) -> contextlib.AbstractContextManager[None]:
        from firefly_lightning.strategies.colossalai.fixes import gemini_masters

        return gemini_masters(self.wrapper)

    @override
    def portable_states(self) -> Iterator[tuple[str, States]]:
        from firefly_lightning.strategies.colossalai.states import read_gemini

        return read_gemini(self.wrapper, self.boosted_optimizer)

    @override
    def load_portable(self, reader: PortableReader, fitting: bool) -> None:
        from firefly_lightning.strategies.colossalai.states import write_gemini

        write_gemini(self.wrapper, self.boosted_optimizer, reader)

    @override
    def layout(self) -> dict[str, Any]:
        (chunk_size,) = self.wrapper.chunk_manager.dp_degree_chunk_size_dict.values()
        return {"tp_size": 1, "chunk_size": int(chunk_size)}

    def _placement(self) -> dict[str, Any]:
        if self.placement_policy == "auto" and not self.fitting:  # no training step to learn from: all goes to the host
            return {"placement_policy": "static", **dict.fromkeys(self.fractions, 1.0)}
        return {"placement_policy": self.placement_policy, **self.fractions}

    def _check_arguments(self, tp_size: int) -> None:
        if tp_size != 1:
            raise FireflyError(
                f"gemini: tp_size {tp_size} is refused, ColossalAI's Gemini computes wrong gradients there; "
                "take tensor_parallel"
            )
        for name, fraction in self.fractions.items():
            if not 0 <= fraction <= 1:
                raise FireflyError(f"gemini: {name} is {fraction}; it is a share between 0 and 1")
        whole = self.fractions["shard_param_frac"] == self.fractions["offload_optim_frac"] == 1
        if self.fractions["offload_param_frac"] and not whole:
            raise FireflyError("gemini: offload_param_frac needs shard_param_frac and offload_optim_frac to be 1")


class TensorParallelStrategy(BoosterStrategy):
    """Tensor parallelism splits every weight matrix over ``tp_size`` processes, which work on the same rows.

    Groups of such processes share the rows. A vocabulary that ``tp_size`` does not divide gets rows of zeros, which
    neither losses nor exports show.

    Args:
        tp_size: Processes that share each row; by default all processes of a node.
        zero_stage: 1 also spreads the optimizer's states over the processes that share the rows.
        plugin_options: Further options of ColossalAI's ``HybridParallelPlugin``, by name.
        process_group_backend: Backend of the process group, such as nccl; by default the usual one of the device.
        timeout: Time after which a collective operation fails.

    Raises:
        FireflyError: If ColossalAI is not installed, or ``tp_size`` is less than 1.
    """

    name = "tensor_parallel"
    own_options = frozenset(
        {
            "tp_size", "zero_stage", "pp_size", "sp_size", "enable_sequence_parallelism", "precision", "max_norm",
            "parallel_output", "make_vocab_size_divisible_by", "dp_outside",
        }
    )  # fmt: skip

    def __init__(
        self,
        tp_size: int | None = None,
        zero_stage: Literal[0, 1] = 0,
        plugin_options: dict[str, Any] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(plugin_options, process_group_backend, timeout)
        if tp_size is not None and tp_size < 1:
            raise FireflyError(f"tensor_parallel: tp_size is {tp_size}; it is 1 or more")
        self._tp_size = tp_size
        self.zero_stage = zero_stage

    @property
    def tp_size(self) -> int:
        """Number of processes that share each row; their ranks follow one another."""
        return self._tp_size or self.num_processes

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size // self.tp_size, "rank": self.global_rank // self.tp_size}

    @override
    def setup_environment(self) -> None:
        if self.world_size % self.tp_size:
            raise FireflyError(f"tensor_parallel: tp_size {self.tp_size} does not divide {self.world_size} processes")
        super().setup_environment()

    @override
    def plugin_class(self) -> Any:
        from firefly_lightning.strategies.colossalai.fixes import FixedHybridPlugin

        return FixedHybridPlugin

    @override
    def options(self, config: BloomConfig) -> dict[str, Any]:
        return {
            "tp_size": self.tp_size,
            "pp_size": 1,
            "zero_stage": self.zero_stage,
            "parallel_output": False,
            "make_vocab_size_divisible_by": 1,  # padded already; ColossalAI's own padding breaks checkpoints
            "broadcast_buffers": False,
            "overlap_communication": not self.simulated,  # on a stream of its own
        }

    @override
    def check_model(self, config: BloomConfig) -> None:
        super().check_model(config)
        if config.n_head % self.tp_size:
            raise FireflyError(
                f"tensor_parallel: tp_size {self.tp_size} does not divide the model's {config.n_head} heads"
            )

    @override
    def own_heads(self, count: int) -> slice:
        own, place = count // self.tp_size, self.global_rank % self.tp_size
        return slice(place * own, (place + 1) * own)

    @override
    def build_model(
        self,
        config: BloomConfig,
        build: Callable[[], BloomForCausalLM],
        put_adapter: Callable[[BloomForCausalLM], None],
    ) -> BloomForCausalLM:
        bloom = build()
        padded_vocabulary.pad(bloom, self.tp_size)
        return bloom

    @override
    def adapt(self, bloom: BloomForCausalLM) -> None:
        padded_vocabulary.hide(bloom)
        bloom.transformer.register_forward_pre_hook(_give_mask, with_kwargs=True)

    @override
    def convert_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Returns the optimizer unchanged: PyTorch's own Adam works on parts of weights as on whole ones."""
        self.check_adam(optimizer)
        return optimizer

    @override
    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with self.booster.no_sync(self.wrapper, self.optimizers[0]):
            yield

    @override
    def step_norm(self, optimizer: Any) -> float:
        from firefly_lightning.strategies.colossalai.fixes import loss_scale

        norm = optimizer.get_grad_norm()
        return float("nan") if norm is None else float(norm) / loss_scale(optimizer)

    @override
    def full_precision(self) -> contextlib.AbstractContextManager[None]:
        from firefly_lightning.strategies.colossalai.fixes import hybrid_masters

        return hybrid_masters(self.bloom.parameters(), self.boosted_optimizer, self.booster.plugin.dp_group)

    @override
    def portable_states(self) -> Iterator[tuple[str, States]]:
        from firefly_lightning.strategies.colossalai.states import read_hybrid

        return read_hybrid(self.bloom, self.boosted_optimizer, self.booster.plugin)

    @override
    def load_portable(self, reader: PortableReader, fitting: bool) -> None:
        from firefly_lightning.strategies.colossalai.states import write_hybrid

        write_hybrid(self.bloom, self.boosted_optimizer, self.booster.plugin, self.booster.checkpoint_io, reader)

    @override
    def layout(self) -> dict[str, Any]:
        return {"tp_size": self.tp_size, "zero_stage": self.zero_stage}


def _give_mask(transformer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Gives rows without padding an attention mask of ones.

    transformers 5 generates without a mask for such rows. It then does not call ``build_alibi_tensor``, which
    ColossalAI has replaced, and takes ALiBi's slopes for a model that has only the heads of this process.
    """
    if kwargs.get("attention_mask") is None:
        ids, past = args[0] if args else kwargs["input_ids"], kwargs.get("past_key_values")
        length = ids.shape[1] + (past.get_seq_length() if past is not None else 0)
        kwargs["attention_mask"] = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
    return args, kwargs


def _plain_output(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """Turns logits of Gemini's subclass of Tensor into plain ones, or it would spread into losses, metrics and logs."""
    with torch._C.DisableTorchFunctionSubclass():
        return logits.as_subclass(Tensor)
