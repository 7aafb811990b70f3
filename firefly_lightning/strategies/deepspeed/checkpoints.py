"""DeepSpeed's checkpoints: one file a rank, which hold what ranks hold, in formats that may hold code."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from firefly_lightning.checkpoints.layout import DEEPSPEED_FOLDER
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.strategies.deepspeed.machine import keep_quiet, require_deepspeed


def read_weights(folder: Path, trainer: dict[str, Any]) -> dict[str, Tensor]:
    """Whole weights in float32, by their names in the ``LightningModule``, from the checkpoint of any stage.

    Args:
        folder: The checkpoint.
        trainer: Contents of its ``trainer.ckpt``.

    Raises:
        FireflyError: If shards are missing or damaged, or DeepSpeed is not installed.
    """
    require_deepspeed()
    keep_quiet()
    weights = read_lazily(folder)
    # Stages 1 and 2 give views of one long tensor, which safetensors takes for a model whose weights are all tied.
    return {name: weight.contiguous().clone() for name, weight in weights.items()}


def read_lazily(folder: Path) -> dict[str, Any]:
    """Whole weights by name: tensors, or what ``contiguous()`` makes one."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with plain_values_only(folder), contextlib.redirect_stdout(io.StringIO()):  # it tells its progress there
        weights: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), DEEPSPEED_FOLDER, lazy_mode=True
        )
    return weights


def fill_sharded(module: nn.Module, weights: dict[str, Any]) -> None:
    """Copies whole weights into a module that is sharded by stage 3; called by all ranks.

    DeepSpeed cannot load its own checkpoint into a module that it does not train.

    Args:
        module: To fill.
        weights: What :func:`read_lazily` gave on rank 0; each is whole only while it is copied. Empty elsewhere.
    """
    import deepspeed

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if name in weights:  # frozen ones may have been left out
                    parameter.copy_(weights[name].contiguous())
        for name, buffer in module.named_buffers():
            buffer.copy_(weights.get(name, buffer))
            torch.distributed.broadcast(buffer, 0)


@contextmanager
def plain_values_only(folder: Path) -> Iterator[None]:
    """Lets DeepSpeed read its shards without running what code they may hold, which its own way of loading would.

    Raises:
        FireflyError: If they hold any, or are missing or damaged.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    forced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(forced)
    os.environ[forced] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except Exception as error:  # of many types, by what is missing or where a file is cut
        raise FireflyError(f"{folder}: the shards cannot be read ({reason(error)}); use an earlier one") from error
    finally:
        os.environ.pop(forced)
        os.environ |= {forced: before} if before is not None else {}
