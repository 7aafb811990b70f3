"""Models as Hugging Face keeps them: reading their folders, and the description from which a checkpoint becomes one."""

from firefly_lightning.huggingface.description import (
    DESCRIPTION_FILES,
    PUBLISHED_DECODING,
    TOKENIZER_CONFIG,
    UNUSED_ROWS,
    check_same_model,
    check_sizes,
    describe,
    write_description,
)
from firefly_lightning.huggingface.folder import find_model_file, load_config, load_prompt_format, load_tokenizer
from firefly_lightning.huggingface.weights import load_bloom, random_bloom

__all__ = [
    "DESCRIPTION_FILES",
    "PUBLISHED_DECODING",
    "TOKENIZER_CONFIG",
    "UNUSED_ROWS",
    "check_same_model",
    "check_sizes",
    "describe",
    "find_model_file",
    "load_bloom",
    "load_config",
    "load_prompt_format",
    "load_tokenizer",
    "random_bloom",
    "write_description",
]
