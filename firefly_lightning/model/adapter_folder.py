"""Writes an adapter as peft keeps it: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.model.adapters import NAME, config_of, put

_PREFIX = "base_model.model."
"""What the names of weights begin with in peft's files."""


def write_adapter(
    folder: Path, fields: Mapping[str, Any], weights: Mapping[str, Tensor], bloom_config: BloomConfig, base: str
) -> None:
    """Writes an adapter into a folder.

    Args:
        folder: An existing folder.
        fields: The adapter's configuration, by the names of peft's fields.
        weights: What was trained, by the names that it has in the model with its adapter.
        bloom_config: Configuration of the model.
        base: Folder or hub name of the model that the adapter is for.

    Raises:
        FireflyError: If peft does not know such an adapter.
    """
    from peft import get_peft_model_state_dict

    config = config_of(fields)
    with torch.device("meta"):
        bloom = BloomForCausalLM(bloom_config)
    put(bloom, config)
    bloom.load_state_dict(weights, strict=False, assign=True)
    # Only peft knows the names in its files; they differ between its methods.
    tensors = get_peft_model_state_dict(bloom, adapter_name=NAME, save_embedding_layers=False)
    stored = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = config.task_type or "CAUSAL_LM"  # without it, peft's AutoPeftModelForCausalLM refuses it
    config.save_pretrained(folder)
