"""Models as Hugging Face keeps them: reading their folders, and the description from which a checkpoint becomes one."""

from firefly_lightning.files.hub import find_model_file
from firefly_lightning.huggingface.description import (
    DESCRIPTION_FILES,
    LICENSE,
    PUBLISHED_DECODING,
    TOKENIZER_CONFIG,
    UNUSED_ROWS,
    check_same_model,
    check_sizes,
    describe,
    write_description,
)
from firefly_lightning.huggingface.folder import base_of, load_config, load_prompt_format, load_tokenizer
from firefly_lightning.huggingface.weights import (
    Quantize,
    check_model,
    digest_of_settings,
    digest_of_weights,
    load_bloom,
    random_bloom,
    stored_dtype,
)

__all__ = [
    "DESCRIPTION_FILES",
    "LICENSE",
    "PUBLISHED_DECODING",
    "TOKENIZER_CONFIG",
    "UNUSED_ROWS",
    "Quantize",
    "base_of",
    "check_model",
    "check_same_model",
    "check_sizes",
    "describe",
    "digest_of_settings",
    "digest_of_weights",
    "find_model_file",
    "load_bloom",
    "load_config",
    "load_prompt_format",
    "load_tokenizer",
    "random_bloom",
    "stored_dtype",
    "write_description",
]
