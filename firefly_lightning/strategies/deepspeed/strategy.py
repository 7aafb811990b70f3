"""ZeRO stages 1, 2 and 3 by DeepSpeed, with optimizer and parameters in host memory or on NVMe where wanted."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adagrad, Optimizer
from transformers import BloomConfig, BloomForCausalLM
from typing_extensions import override

from firefly_lightning.checkpoints.layout import DEEPSPEED_FOLDER
from firefly_lightning.checkpoints.portable import PortableReader, States
from firefly_lightning.data.protocol import data_of
from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.agreement import agreed
from firefly_lightning.strategies.deepspeed.checkpoints import fill_sharded, plain_values_only, read_lazily
from firefly_lightning.strategies.deepspeed.config import (
    check_zero,
    device_of,
    read_config,
    settle,
    settle_precision,
    without_auto,
)
from firefly_lightning.strategies.deepspeed.init import sharded_hugging_face, whole_parameters
from firefly_lightning.strategies.deepspeed.machine import compute_on_cpu, cpu_adam, keep_quiet, require_deepspeed
from firefly_lightning.strategies.hooks import StrategyHooks
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints


class ZeroStrategy(StrategyHooks, ShardedCheckpoints, DeepSpeedStrategy):
    """Lightning's ``DeepSpeedStrategy``, which also runs on CPUs and accumulates and initialises exactly.

    Args:
        kwargs: Arguments of Lightning's strategy. One is ``config``, a DeepSpeed configuration or its JSON file, which
            holds in place of all other arguments. Settings that the plan of steps and the trainer decide (rows of a
            micro-batch, accumulation, clipping, precision) need not be in it.

    Raises:
        FireflyError: If DeepSpeed is not installed, or does not have a stage or offloading that is asked for.
    """

    norm_follows_step = True
    trains_adapters = True
    splits_states = True
    config: dict[str, Any]

    def __init__(self, **kwargs: Any) -> None:
        require_deepspeed()
        keep_quiet()
        super().__init__(**kwargs)
        if self.load_full_weights:
            raise FireflyError("load_full_weights: export the checkpoint and name the folder as model.path instead")
        self._given = without_auto(self.config or {})
        check_zero(self._given)
        self._given.setdefault("zero_allow_untested_optimizer", True)
        self.config = self._given

    @property
    def generates_in_step(self) -> bool:  # type: ignore[override]
        """True for stage 3, which gathers the weights of a layer from all ranks while it computes."""
        return self.zero_stage_3

    @property
    def whole_weights(self) -> bool:  # type: ignore[override]
        """True for stages 1 and 2, which shard only what belongs to the optimizer."""
        return not self.zero_stage_3

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed asks for the index of the device, and Lightning's CPU device has none.
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    @override
    def setup_environment(self) -> None:
        # Each run has its own plan of steps; Lightning would complete the configuration for the first run only.
        self.config, self._config_initialized = deepcopy(self._given), False
        if self._on_cpu:
            compute_on_cpu()
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    @override
    def setup_distributed(self) -> None:
        if not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        """Under stage 3, shards parameters as they are made, and has them initialised or loaded correctly."""
        self._init_config_if_needed()
        if not self.zero_stage_3:
            yield
            return
        with super().model_sharded_context(), sharded_hugging_face(self.config):
            yield

    @override
    def check_model(self, config: BloomConfig) -> None:
        self._init_config_if_needed()

    @override
    def build_model(
        self,
        config: BloomConfig,
        build: Callable[[], BloomForCausalLM],
        put_adapter: Callable[[BloomForCausalLM], None],
    ) -> BloomForCausalLM:
        bloom = agreed(build)
        with whole_parameters(enabled=self.zero_stage_3):
            put_adapter(bloom)
        return bloom

    @override
    def convert_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if isinstance(optimizer, Adagrad):  # DeepSpeed puts one of its own in its place
            raise FireflyError(
                "DeepSpeed's Adagrad follows no schedule and no checkpoint; take RMSprop, or auto, ddp or fsdp2"
            )
        return cpu_adam(optimizer) if self._needs_cpu_adam else optimizer

    @override
    def gradient_norm(self, parameters: Iterable[Parameter]) -> Tensor:
        norm = torch.as_tensor(self.deepspeed_engine.get_global_grad_norm() or 0.0, dtype=torch.float32)
        return norm if norm >= 0 else torch.full((), torch.inf)  # DeepSpeed gives -1 for a norm that is not finite

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of micro-batches already; DeepSpeed would do so again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def portable_states(self) -> Iterator[tuple[str, States]]:
        from firefly_lightning.strategies.deepspeed.states import read_states

        module: Any = self.lightning_module
        return read_states(self._zero, module)

    @override
    def optimizer_scalars(self) -> dict[str, Any]:
        from firefly_lightning.strategies.deepspeed.states import scalars

        return scalars(self._zero)

    @override
    def scaler_state(self) -> dict[str, Any]:
        from firefly_lightning.strategies.deepspeed.states import scaler_state

        return scaler_state(self._zero)

    @override
    def load_scaler_state(self, state: dict[str, Any]) -> None:
        from firefly_lightning.strategies.deepspeed.states import load_scaler_state

        load_scaler_state(self._zero, state)

    @override
    def load_portable(self, reader: PortableReader, fitting: bool) -> None:
        from firefly_lightning.strategies.deepspeed.states import write_states, write_weights

        module: Any = self.lightning_module
        if fitting:
            write_states(self._zero, module, reader)
        else:
            write_weights(module, reader)

    @override
    def save_shards(self, folder: Path) -> None:
        excludes = self.exclude_frozen_parameters or getattr(self.lightning_module, "saves_trained_only", False)
        self.deepspeed_engine.save_checkpoint(str(folder), tag=DEEPSPEED_FOLDER, exclude_frozen_parameters=excludes)

    @override
    def load_shards(self, folder: Path, fitting: bool) -> None:
        module: Any = self.lightning_module
        if self.zero_stage_3 and not fitting:
            fill_sharded(module, agreed(lambda: read_lazily(folder) if self.is_global_zero else {}))
            return
        with plain_values_only(folder):
            self.deepspeed_engine.load_checkpoint(
                str(folder),
                tag=DEEPSPEED_FOLDER,
                load_optimizer_states=fitting,
                load_lr_scheduler_states=False,  # Lightning restores the schedule
                load_module_strict=module.strict_loading,
            )

    @override
    def writer(self) -> dict[str, Any]:
        zero = self.config["zero_optimization"]
        offload = {name: device_of(zero, name) for name in ("offload_optimizer", "offload_param")}
        return {"engine": "deepspeed", "stage": zero["stage"], **offload, "processes": self.world_size}

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around the module's; None while evaluating, when stage 3 has another object there."""
        module: Any = self.lightning_module
        return self.deepspeed_engine.optimizer if module.trainer.state.fn == TrainerFn.FITTING else None

    @property
    def _needs_cpu_adam(self) -> bool:
        forced = self.config.get("zero_force_ds_cpu_optimizer", True)
        return bool(forced) and device_of(self.config["zero_optimization"], "offload_optimizer") != "none"

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @override
    def _load_config(self, config: Any) -> dict[str, Any] | None:
        loaded = super()._load_config(read_config(config) if isinstance(config, str | Path) else config)
        return without_auto(loaded) if loaded is not None else None

    @override
    def _format_config(self) -> None:
        module: Any = self.lightning_module
        if module.trainer.gradient_clip_algorithm == "value":
            raise FireflyError("trainer.gradient_clip_algorithm: DeepSpeed clips by norm only; leave it out")
        settle_precision(self.config, str(self.precision_plugin.precision))
        super()._format_config()
        from deepspeed.accelerator import get_accelerator

        if self.config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
            name = self.precision_plugin.precision
            raise FireflyError(f"trainer.precision {name}: DeepSpeed has no fp16 on this processor; take bf16-mixed")

    @override
    def _format_batch_size_and_grad_accum_config(self) -> None:
        """Sets batch sizes, accumulation and clipping as the plan of steps and the trainer have them, while fitting."""
        module: Any = self.lightning_module
        trainer, config = module.trainer, self.config
        if trainer.state.fn != TrainerFn.FITTING:
            config.pop("train_batch_size", None)
            config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
            return
        accumulated = trainer.accumulate_grad_batches
        settle(config, "gradient_accumulation_steps", accumulated, "the plan of steps")
        if (data := data_of(trainer)) and data.train is not None:
            settle(config, "train_micro_batch_size_per_gpu", data.train.division.rows, "the plan of steps")
        micro = config.setdefault("train_micro_batch_size_per_gpu", self._auto_select_batch_size())
        settle(config, "train_batch_size", micro * accumulated * self.world_size, "the plan of steps")
        if trainer.gradient_clip_val is not None:
            settle(config, "gradient_clipping", trainer.gradient_clip_val, "the trainer")
        config.setdefault("gradient_clipping", 0.0)  # DeepSpeed would clip to a norm of 1 where nothing is said

    @override
    def _auto_select_batch_size(self) -> int:
        try:
            return super()._auto_select_batch_size()
        except AttributeError:  # the data set makes the batches itself; DeepSpeed only logs this number
            return 1

    @override
    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        """The module's optimizer and schedule; where its states are offloaded it must be DeepSpeed's own Adam.

        Raises:
            FireflyError: If it is another optimizer and its states are offloaded, or if the configuration has a
                schedule besides the module's.
        """
        optimizer, scheduler = super()._init_optimizers()
        if scheduler is not None and "scheduler" in self.config:
            raise FireflyError(
                "the DeepSpeed configuration has a scheduler but no optimizer, and the module has both: "
                "leave the scheduler out there, or name the optimizer there too"
            )
        if self._needs_cpu_adam and type(optimizer).__name__ != "DeepSpeedCPUAdam":
            raise FireflyError(
                f"offload_optimizer needs DeepSpeedCPUAdam, not {type(optimizer).__name__}; "
                "in configure_optimizers, take self.trainer.strategy.convert_optimizer(optimizer)"
            )
        return optimizer, scheduler
