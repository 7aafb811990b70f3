"""Where the Bloom of a run comes from, and what of it is trained: all weights, or an adapter on a frozen base."""

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import BloomForCausalLM

from firefly_lightning.checkpoints.contents import check_contents
from firefly_lightning.checkpoints.layout import ADAPTER_KEY
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import FireflyError, require
from firefly_lightning.huggingface import (
    Quantize,
    base_of,
    check_model,
    digest_of_settings,
    digest_of_weights,
    load_bloom,
    load_config,
    random_bloom,
)
from firefly_lightning.model.adapters import as_config, check_adapter, check_same, compute_in, fields_of, put


def autocast_dtype(precision: Any) -> torch.dtype | None:
    """The type in which autocast computes products in a precision of the trainer; None where nothing is cast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(precision))


class ModelSource:
    """Builds the model of a run.

    Args:
        path: Folder or hub name of the model.
        from_scratch: Whether it begins with random weights for the folder's ``config.json``.
        adapter: The adapter as the user writes it, see :func:`firefly_lightning.model.adapters.as_config`; None to
            train all weights.
        quantize: How the frozen weights are kept: in 4 bits, in 8, or as they are for None.

    Attributes:
        adapter: The configuration of peft, or None.
        quantize: How the frozen weights are kept.

    Raises:
        FireflyError: If the arguments do not go together, or a package that they need is missing.
    """

    def __init__(self, path: str, from_scratch: bool, adapter: Any, quantize: Quantize | None) -> None:
        self.path, self._from_scratch, self.quantize = path, from_scratch, quantize
        self.adapter = as_config(adapter)
        if self.adapter is None and quantize:
            raise FireflyError(
                f"model.quantize {quantize}: quantised weights cannot be trained; set model.adapter: lora"
            )
        if self.adapter is not None and from_scratch:
            raise FireflyError("model.adapter: an adapter of random weights is of no use; leave model.from_scratch out")
        if quantize:
            require("adapters", "bitsandbytes")
        self._digest = ""

    def check(self) -> None:
        """Refuses a model whose files are not all there, and an adapter that does not fit it; reads no weights.

        Raises:
            FireflyError: If the folder holds no whole Bloom, or the adapter does not fit it.
        """
        config = check_model(self.path, self._from_scratch)
        if self.adapter is not None:
            if base_of(self.path):
                raise FireflyError(
                    f"model.path {self.path}: is an adapter itself; merge it first: firefly export --checkpoint "
                    f"{self.path} --out FOLDER"
                )
            check_adapter(self.adapter, config)

    def load(self, dtype: torch.dtype, compute_dtype: torch.dtype) -> BloomForCausalLM:
        """The whole model in host memory, without its adapter.

        Args:
            dtype: Type of the weights.
            compute_dtype: Type in which the products of quantised weights are computed.

        Raises:
            FireflyError: If the model cannot be loaded.
        """
        if self._from_scratch:
            return random_bloom(load_config(self.path), dtype)
        return load_bloom(self.path, dtype, self.quantize, compute_dtype)

    def put_adapter(self, bloom: BloomForCausalLM, kept_in: torch.dtype | None = None) -> None:
        """Puts the adapter, if there is one, into a model, whose weights need not be in memory yet.

        Args:
            bloom: The model.
            kept_in: Type in which frozen linear layers are computed and can be kept; as they are by default.
        """
        if self.adapter is None:
            return
        put(bloom, self.adapter, int(os.environ.get("PL_GLOBAL_SEED", 0)))
        if kept_in is not None and not self.quantize:
            compute_in(bloom, self.adapter, kept_in)

    def note_base(self, share: Callable[[Any], Any], first: bool) -> None:
        """Learns the digest of the frozen weights, which one process reads for all.

        Args:
            share: Gives every process what the first one calls it with.
            first: Whether this is the first process.
        """
        if self.adapter is not None:
            self._digest = share(digest_of_weights(self.path) if first else None)

    def identity(self, share: Callable[[Any], Any], first: bool) -> str | None:
        """What identifies the weights that a model begins with, without its adapter; None where they are random.

        Args:
            share: Gives every process what the first one calls it with.
            first: Whether this is the first process, which reads the weights' files.
        """
        if self._from_scratch:
            return None
        digest = self._digest or share(digest_of_weights(self.path) if first else None)
        settings = share(digest_of_settings(self.path) if first else None)
        return f"{digest} {self.quantize or 'as they are'} {settings}"

    def record(self) -> dict[str, Any] | None:
        """What a checkpoint says of the adapter and its base, in plain values; None where all weights are trained."""
        if self.adapter is None:
            return None
        base = str(Path(self.path).expanduser().resolve()) if Path(self.path).is_dir() else self.path
        return {"config": self._fields, "base": {"path": base, "xxh3_128": self._digest}}

    def check_checkpoint(self, checkpoint: str) -> None:
        """Checks before weights are loaded what :meth:`check_record` does when the checkpoint is.

        Args:
            checkpoint: The checkpoint that the run begins with.

        Raises:
            FireflyError: If it is damaged, or of another adapter or base.
        """
        if (file := trainer_file(Path(checkpoint))).is_file():
            contents = load_file(file, "cpu")
            check_contents(contents, file)
            self.check_record(contents.get(ADAPTER_KEY))

    def check_record(self, saved: Mapping[str, Any] | None) -> None:
        """Checks that a checkpoint is of this adapter on this base, or of a training of all weights as this is.

        Args:
            saved: What :meth:`record` gave when the checkpoint was saved.

        Raises:
            FireflyError: If it is not.
        """
        if self.adapter is None and saved is not None:
            raise FireflyError(
                "the checkpoint is of an adapter, the run trains all weights; set model.adapter and model.path as they "
                "were, or name the folder that firefly export makes of it as model.path"
            )
        if self.adapter is not None and saved is None:
            raise FireflyError(
                "model.adapter: the checkpoint is of a training of all weights; export it with firefly export and name "
                "the folder as model.path"
            )
        if saved is not None:
            check_same(saved["config"], self._fields)
            base = saved["base"]
            if base["xxh3_128"] != self._digest:
                raise FireflyError(
                    f"model.path {self.path}: has other weights than the checkpoint's base, which was {base['path']}; "
                    "name that one"
                )

    @cached_property
    def _fields(self) -> dict[str, Any]:
        return fields_of(self.adapter)
