"""A Bloom with its weights."""

from pathlib import Path

import torch
import transformers
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError, reason, some
from firefly_lightning.files.model_json import FLOATS, check_index, layers_beyond, read_generation_config
from firefly_lightning.huggingface.folder import find_model_file, load_config, quiet_transformers


def load_bloom(path: str, dtype: torch.dtype) -> BloomForCausalLM:
    """A Bloom with all its weights.

    Args:
        path: Folder or hub name of the model.
        dtype: Type that the weights are converted to.

    Raises:
        FireflyError: If the model is no Bloom, its weights are missing, damaged, incomplete or of other sizes, or its
            settings of generation cannot be used.
    """
    config = load_config(path)
    if file := find_model_file(path, "generation_config.json"):
        read_generation_config(file)
    check_index(Path(path))
    # transformers 4.51 knows only the old name of the argument, 5 means to drop it.
    dtype_name = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    try:
        with quiet_transformers():
            model, info = BloomForCausalLM.from_pretrained(
                path, config=config, output_loading_info=True, **{dtype_name: dtype}
            )
    except Exception as error:  # whatever the readers of the several weight formats raise
        raise FireflyError(f"{path}: the weights cannot be read ({reason(error)}); fetch them again") from error
    # transformers would go on with random numbers in the place of missing weights, and without layers too many.
    if missing := sorted(info["missing_keys"]):
        raise FireflyError(f"{path}: the weights lack {some(missing)}; fetch them again")
    if layers := layers_beyond(config.n_layer, info["unexpected_keys"]):
        raise FireflyError(f"{path}: the weights have {some(layers)}, which config.json lacks; fetch both again")
    for name in FLOATS:  # transformers refuses a temperature of 2, and takes 2.0
        if isinstance(value := getattr(model.generation_config, name, None), int):
            setattr(model.generation_config, name, float(value))
    return model


def random_bloom(config: BloomConfig, dtype: torch.dtype) -> BloomForCausalLM:
    """A Bloom with weights drawn as Hugging Face draws them, from PyTorch's random state."""
    return BloomForCausalLM(config).to(dtype)
