"""Simulates a device, so that ColossalAI runs on CPUs: for the dry run of a configuration meant for a cluster.

The device's memory is the host's. ColossalAI is told that ``cpu:0`` is the device and ``cpu`` the host, so that it
really gathers and shards tensors and moves them between the two. Importing this module imports ColossalAI.
"""

import contextlib
from typing import Any

import psutil  # type: ignore
import torch
from colossalai.accelerator import CpuAccelerator, set_accelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.legacy.core import global_context
from colossalai.legacy.utils import memory
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.memory_tracer.memory_monitor import MemoryMonitor
from torch import Tensor
from typing_extensions import override

DEVICE = torch.device("cpu", 0)
"""The simulated device; the host is ``torch.device("cpu")``, and tensors on either say that they are on ``cpu``."""


def install(capacity: int | None = None) -> None:
    """Makes ColossalAI take this process's CPU for its device; further calls change only the capacity.

    Args:
        capacity: Bytes of memory that the device has; by default all of the machine's memory.
    """
    set_accelerator(SimulatedAccelerator())
    memory.colo_set_cpu_memory_capacity(capacity or psutil.virtual_memory().total)
    global_context.num_processes_on_current_node = 1  # the capacity is that of one process
    if _TorchAdam not in CPUAdamLoader.REGISTRY:
        CPUAdamLoader.REGISTRY[:] = [_TorchAdam]  # ColossalAI's own cannot be built without CUDA's headers
    Chunk.shard_move, Chunk.close_chunk = _shard_move, _close_chunk


class _Stream:
    """A stream that never waits, since work on a CPU is done when the call returns."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class SimulatedAccelerator(CpuAccelerator):  # type: ignore[misc]
    """Answers like a GPU with one stream; ColossalAI's own CPU accelerator raises an error at most of these calls."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"  # ZeRO and Gemini insist on this name

    @override
    def get_current_device(self) -> torch.device:
        return DEVICE

    @override
    def current_device(self) -> int:
        return 0

    @override
    def device_count(self) -> int:
        return 1

    @override
    def set_device(self, device: Any = None) -> None:
        pass

    @override
    def synchronize(self, device: Any = None) -> None:
        pass

    @override
    def empty_cache(self) -> None:
        pass

    @override
    def Stream(self, *args: Any, **kwargs: Any) -> _Stream:
        return _Stream()

    @override
    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    @override
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @override
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    @override
    def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    @override
    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


class NoActivations(MemoryMonitor):  # type: ignore[misc]
    """Tells Gemini's ``auto`` placement that only the model needs memory: torch does not count tensors on a CPU."""

    @override
    def start(self) -> None:
        pass

    @override
    def finish(self) -> int:
        return 0


class _AdamKernel:
    """The kernel of ColossalAI's CPUAdam, written in PyTorch."""

    def __init__(self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool) -> None:
        self.decoupled = decoupled

    def step(
        self, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, bias_correction: bool,
        parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, div_scale: float,
    ) -> None:  # fmt: skip
        grad = grad.float() if div_scale == -1 else grad.float() / div_scale
        if self.decoupled:
            parameter.mul_(1 - lr * weight_decay)
        else:
            grad = grad.add(parameter, alpha=weight_decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        parameter.addcdiv_(mean, (square / second).sqrt_().add_(eps), value=-lr / first)


class _TorchAdam:
    """Stands for a built kernel where ColossalAI's loader of kernels looks for one."""

    CPUAdamOptimizer = _AdamKernel
    priority = 0

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None:
        pass

    def load(self) -> type:
        return _TorchAdam


class _LikeCuda:
    """Passes for the simulated device where chunks ask for a type: ``DEVICE`` itself says ``cpu``, as the host does."""

    type = "cuda"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


_shard_move_to, _close = Chunk.shard_move, Chunk.close_chunk


def _shard_move(chunk: Any, device: torch.device, *args: Any, **kwargs: Any) -> None:
    if device != DEVICE:
        _shard_move_to(chunk, device, *args, **kwargs)
    elif chunk.cuda_shard is None:  # otherwise the shard is on the device already
        _shard_move_to(chunk, _LikeCuda(), *args, **kwargs)


def _close_chunk(chunk: Any) -> None:
    if chunk.shard_device == DEVICE:
        chunk.shard_device = _LikeCuda()
    _close(chunk)
