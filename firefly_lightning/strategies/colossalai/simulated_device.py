"""A device that is not there, so that ColossalAI runs on CPUs: the dry run of a configuration meant for a cluster.

Its memory is the host's. ColossalAI is told that ``cpu:0`` is the device and ``cpu`` the host, so that what it gathers,
shards and moves between the two really happens. Import this only where the engine is wanted: it imports ColossalAI.
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
"""The device, where the host is ``torch.device("cpu")``; tensors on either say ``cpu``."""


def install(capacity: int | None = None) -> None:
    """Makes ColossalAI take this process's CPU for its device; a second time only the capacity changes.

    Args:
        capacity: Bytes that the device has; all of the machine's memory by default.
    """
    set_accelerator(SimulatedAccelerator())
    memory.colo_set_cpu_memory_capacity(capacity or psutil.virtual_memory().total)
    global_context.num_processes_on_current_node = 1  # the capacity is that of one process
    if _TorchAdam not in CPUAdamLoader.REGISTRY:
        CPUAdamLoader.REGISTRY[:] = [_TorchAdam]  # ColossalAI's own cannot be built without CUDA's headers
    Chunk.shard_move, Chunk.close_chunk = _shard_move, _close_chunk


class _Stream:
    """Work on a CPU is done when the call returns: there is nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class SimulatedAccelerator(CpuAccelerator):  # type: ignore[misc]
    """Answers like a GPU with one stream; ColossalAI's own CPU accelerator raises at most of this."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"  # what ZeRO and Gemini insist on

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
    """Tells Gemini's ``auto`` placement that only the model needs memory: torch does not count a CPU's tensors."""

    @override
    def start(self) -> None:
        pass

    @override
    def finish(self) -> int:
        return 0


class _AdamKernel:
    """ColossalAI's kernel of CPUAdam, in torch."""

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
    """What a kernel's loader wants to know."""

    CPUAdamOptimizer = _AdamKernel
    priority = 0

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None:
        pass

    def load(self) -> type:
        return _TorchAdam


class _LikeCuda:
    """Passes for any CUDA device: chunks ask a device for its type, which is ``cpu`` for ``DEVICE`` as for the host."""

    type = "cuda"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


_shard_move_to, _close = Chunk.shard_move, Chunk.close_chunk


def _shard_move(chunk: Any, device: torch.device, *args: Any, **kwargs: Any) -> None:
    if device != DEVICE:
        _shard_move_to(chunk, device, *args, **kwargs)
    elif chunk.cuda_shard is None:  # else it is there already
        _shard_move_to(chunk, _LikeCuda(), *args, **kwargs)


def _close_chunk(chunk: Any) -> None:
    if chunk.shard_device == DEVICE:
        chunk.shard_device = _LikeCuda()
    _close(chunk)
