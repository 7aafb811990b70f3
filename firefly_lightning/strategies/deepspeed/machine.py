"""DeepSpeed on this machine: whether it is installed, where it computes and logs, and what it compiles."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Adam, AdamW, Optimizer

from firefly_lightning.errors import FireflyError, reason, require


def require_deepspeed() -> None:
    """Checks that the packages of the extra ``deepspeed`` are installed.

    Raises:
        FireflyError: If one of them is not installed.
    """
    require("deepspeed", "deepspeed", "accelerate")  # transformers loads sharded weights with accelerate


def keep_quiet() -> None:
    """Moves DeepSpeed's warnings to standard error, and leaves out those that a user can do nothing about."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed calls it
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_is_news)
    import deepspeed  # noqa: F401  (gives the logger its handler)

    logger.handlers.clear()  # without any, Python writes warnings to standard error
    logger.propagate = True


def _is_news(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def compute_on_cpu() -> None:
    """Makes DeepSpeed compute on the CPU, also on a machine with GPUs.

    DeepSpeed chooses its device when it is imported, before a trainer can tell it; ``DS_ACCELERATOR`` overrules both.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if get_accelerator().device_name() != "cpu" and "DS_ACCELERATOR" not in os.environ:
        set_accelerator(CPU_Accelerator())
    # Every process that starts would compile this operation, which only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cpu_adam(optimizer: Optimizer) -> Optimizer:
    """Turns PyTorch's Adam or AdamW into a ``DeepSpeedCPUAdam``, which steps in host memory, on offloaded states.

    Raises:
        FireflyError: If it is another optimizer or variant of Adam, or DeepSpeed's Adam cannot be compiled here.
    """
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return optimizer
    decoupled = {Adam: False, AdamW: True}.get(type(optimizer))
    if decoupled is None or any(optimizer.defaults.get(variant) for variant in ("amsgrad", "maximize")):
        settings = [name for name in ("amsgrad", "maximize") if optimizer.defaults.get(name)]
        name = " with ".join([type(optimizer).__name__, *settings])
        raise FireflyError(f"offload_optimizer: DeepSpeed has no {name} on the host; take torch.optim.AdamW or Adam")
    decoupled = decoupled or bool(optimizer.defaults.get("decoupled_weight_decay"))
    known = ("params", "lr", "betas", "eps", "weight_decay", "initial_lr")
    groups = [{name: group[name] for name in known if name in group} for group in optimizer.param_groups]
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    _announce()
    remember_processor()
    with _build_tools():
        converted: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=decoupled)
    return converted


@cache
def remember_processor() -> None:
    """Has py-cpuinfo look at the processor once: it takes over a second, and DeepSpeed asks it four times a start."""
    import cpuinfo

    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


@cache
def _announce() -> None:
    rank_zero_info("DeepSpeed compiles its Adam when it is first used on a machine; that takes a minute or two")


@contextmanager
def _build_tools() -> Iterator[None]:
    """Lets DeepSpeed find ``ninja``, which lies beside the interpreter, to compile its Adam when it is first used.

    Raises:
        FireflyError: If DeepSpeed cannot compile its Adam.
    """
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    except RuntimeError as error:
        compiler = os.environ.get("CXX", "c++")
        cause = reason(error.__cause__ or error)
        problem = cause if shutil.which(compiler) else f"there is no C++ compiler {compiler}"
        raise FireflyError(f"offload_optimizer: DeepSpeed cannot compile its Adam ({problem}); install g++") from error
    finally:
        os.environ["PATH"] = before
