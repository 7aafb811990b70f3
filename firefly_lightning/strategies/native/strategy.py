"""PyTorch's own parallelism through Lightning's ModelParallelStrategy: ``fsdp2`` and ``native_tp``."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import BloomConfig, BloomForCausalLM
from typing_extensions import override

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies.agreement import agreed
from firefly_lightning.strategies.hooks import StrategyHooks
from firefly_lightning.strategies.native.checkpoints import NativeCheckpoints
from firefly_lightning.strategies.native.dtensors import AXES, local, norm
from firefly_lightning.strategies.native.model import fill, fully_shard, split_tensors, tie

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
"""Precisions that Lightning allows for its own ModelParallelStrategy; it does not check strategies of other names."""


class NativeStrategy(StrategyHooks, NativeCheckpoints):
    """Trains a Bloom that PyTorch itself splits over processes: what FSDP2 and tensor parallelism share.

    Args:
        data_parallel_size: Processes that share the rows, or "auto".
        tensor_parallel_size: Processes that share each row, or "auto".
        save_distributed_checkpoint: Save a folder into which every process writes its part, not one file of the whole
            model. Only the same strategy on as many processes resumes from such a folder.
        process_group_backend: Backend of the process group, such as nccl; by default the usual one of the device.
        timeout: Time after which a collective operation fails.
    """

    splits_states = True

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self._in_forward: Callable[[Callable[[], Any]], Any] = _call

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name of the strategy, for messages."""

    @property
    @abstractmethod
    def fully_sharded(self) -> bool:
        """Whether FSDP2 splits the weights, alone or around tensor parallelism."""

    @override
    def setup_environment(self) -> None:
        """Refuses precisions and versions of PyTorch that do not work, then starts the process group.

        Raises:
            FireflyError: If the strategy cannot train in this precision or with this PyTorch.
        """
        if self.precision_plugin.precision not in PRECISIONS:
            raise FireflyError(f"{self.name}: cannot do precision {self.precision_plugin.precision}; take bf16-mixed")
        if self.fully_sharded and torch.__version__ < "2.6" and self.root_device.type == "cpu":
            raise FireflyError(
                f"{self.name}: torch {torch.__version__} runs FSDP2 on GPUs only (it needs CUDA's streams); "
                "take a newer torch, or another strategy"
            )
        super().setup_environment()
        self.generates_in_step = self.fully_sharded

    @override
    def build_model(
        self,
        config: BloomConfig,
        build: Callable[[], BloomForCausalLM],
        put_adapter: Callable[[BloomForCausalLM], None],
    ) -> BloomForCausalLM:
        """Builds the whole model on the first process only, and gives every process its part, tensor by tensor.

        Raises:
            FireflyError: On all processes, if the first one cannot build the model.
        """
        whole = partial(super().build_model, config, build, put_adapter)
        source = agreed(lambda: whole() if self.is_global_zero else None)
        configs: Any = self.broadcast(None if source is None else (source.config, source.generation_config))
        with torch.device("meta"):
            model = BloomForCausalLM(configs[0]).to(torch.get_default_dtype())
            put_adapter(model)
        model.generation_config = configs[1]
        self.split_model(model)
        model.to_empty(device=self.root_device)
        tie(model)
        fill(model, source)
        return model

    def split_model(self, model: BloomForCausalLM) -> None:
        """Splits the model by FSDP2 where it is used; the weights need not be in memory yet."""
        if self.fully_sharded:
            self._in_forward = fully_shard(model, self.device_mesh[AXES[0]])

    @override
    def gradient_norm(self, parameters: Iterable[Parameter]) -> Tensor:
        return norm(_gradients(parameters), self.root_device)

    @override
    def setup_precision_plugin(self) -> None:
        """Has this class clip gradients: PyTorch's functions refuse gradients of which only some are split."""
        super().setup_precision_plugin()
        vars(self.precision_plugin).update(clip_grad_by_norm=self._clip_by_norm, clip_grad_by_value=_clip_by_value)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._in_root("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._in_root("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._in_root("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._in_root("predict_step", *args, **kwargs)

    def _in_root(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a step of the module inside a forward pass of FSDP2's root.

        The step calls parts of the model, and only the root's own forward pass gathers embedding, head and last norm.
        """
        return self._in_forward(partial(getattr(self.lightning_module, name), *args, **kwargs))

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        gradients = _gradients(_parameters(optimizer))
        scale = (clip_val / (norm(gradients, self.root_device) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(scale)


class FSDP2Strategy(NativeStrategy):
    """PyTorch's FSDP2: every process holds a part of every weight, and works on its own rows.

    Gradients are reduced after every micro-batch, so that no process holds them whole.

    Args:
        save_distributed_checkpoint: Save a folder into which every process writes its part, not one file of the whole
            model. Only the same strategy on as many processes resumes from such a folder.
        process_group_backend: Backend of the process group, such as nccl; by default the usual one of the device.
        timeout: Time after which a collective operation fails.
    """

    name = "fsdp2"
    fully_sharded = True
    trains_adapters = True

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class NativeTensorParallelStrategy(NativeStrategy):
    """PyTorch's tensor parallelism: processes hold parts of the heads, the wide layers and the vocabulary.

    By default the processes of a node share each row. FSDP2 is put around them where the run has more processes.
    """

    name = "native_tp"

    @property
    @override
    def fully_sharded(self) -> bool:
        return self._data_parallel_size != 1

    @override
    def setup_environment(self) -> None:
        """Refuses sizes that do not make up the number of processes.

        Raises:
            FireflyError: If the sizes do not make up that number, or if the strategy cannot be used here.
        """
        world_size = self.num_nodes * self.num_processes
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = self.num_processes
        if self._data_parallel_size == "auto":
            self._data_parallel_size = max(world_size // self._tensor_parallel_size, 1)
        sizes = self._data_parallel_size, self._tensor_parallel_size
        if sizes[0] * sizes[1] != world_size:
            raise FireflyError(
                f"{self.name}: data_parallel_size {sizes[0]} times tensor_parallel_size {sizes[1]} must be "
                f"the {world_size} processes of the run"
            )
        super().setup_environment()

    @override
    def check_model(self, config: BloomConfig) -> None:
        size = self._tensor_parallel_size
        if config.n_head % int(size):
            raise FireflyError(
                f"{self.name}: tensor_parallel_size {size} does not divide the model's {config.n_head} heads"
            )

    @override
    def own_heads(self, count: int) -> slice:
        mesh = self.device_mesh[AXES[1]]
        own = count // mesh.size()
        return slice(mesh.get_local_rank() * own, (mesh.get_local_rank() + 1) * own)

    @override
    def convert_optimizer(self, optimizer: Optimizer) -> Optimizer:
        for option in ("foreach", "fused"):
            if optimizer.defaults.get(option):
                raise FireflyError(
                    f"{self.name}: {type(optimizer).__name__} cannot be {option}, since only some of the weights "
                    "are split; leave it out"
                )
        return optimizer

    @override
    def split_model(self, model: BloomForCausalLM) -> None:
        split_tensors(model, self.device_mesh[AXES[1]])
        super().split_model(model)


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _parameters(optimizer: Optimizer) -> Iterable[Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _gradients(parameters: Iterable[Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clip_by_value(optimizer: Optimizer, clip_val: float) -> None:
    for gradient in _gradients(_parameters(optimizer)):
        local(gradient).clamp_(-clip_val, clip_val)
