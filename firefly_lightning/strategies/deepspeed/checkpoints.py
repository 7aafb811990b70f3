"""Reads DeepSpeed's checkpoints, in which every rank has files for its shards, in formats that may hold code."""

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
        trainer: Contents of the checkpoint's ``trainer.ckpt``.

    Raises:
        FireflyError: If shards are missing or damaged, or DeepSpeed is not installed.
    """
    require_deepspeed()
    keep_quiet()
    weights = read_lazily(folder)
    # Stages 1 and 2 give views of one long tensor, which safetensors takes for a model whose weights are all tied.
    return {name: weight.contiguous().clone() for name, weight in weights.items()}


def read_lazily(folder: Path) -> dict[str, Any]:
    """Whole weights by name, each a tensor or an object whose ``contiguous()`` gives the tensor."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with plain_values_only(folder), contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
        weights: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), DEEPSPEED_FOLDER, lazy_mode=True
        )
    return weights


def fill_sharded(module: nn.Module, weights: dict[str, Any]) -> None:
    """Copies whole weights into a module that is sharded by stage 3; called by all ranks.

    DeepSpeed cannot load its own checkpoint into a module that it does not train.

    Args:
        module: The module to fill.
        weights: On rank 0 what :func:`read_lazily` gave, where each weight is whole only while it is copied; empty on
            the other ranks.
    """
    import deepspeed

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if name in weights:  # the checkpoint may have been saved without frozen weights
                    parameter.copy_(weights[name].contiguous())
        for name, buffer in module.named_buffers():
            buffer.copy_(weights.get(name, buffer))
            torch.distributed.broadcast(buffer, 0)


@contextmanager
def plain_values_only(folder: Path) -> Iterator[None]:
    """Lets DeepSpeed read its shards without running code that they may hold, as its own way of loading them would.

    Raises:
        FireflyError: If the shards hold code, or are missing or damaged.
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
    except Exception as error:  # its type depends on what is missing or where a file is cut
        raise FireflyError(f"{folder}: the shards cannot be read ({reason(error)}); use an earlier one") from error
    finally:
        os.environ.pop(forced)
        os.environ |= {forced: before} if before is not None else {}
