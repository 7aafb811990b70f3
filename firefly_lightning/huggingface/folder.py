"""Files of a model's folder, or of a model on the hub: its configuration, tokenizer and prompt format."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers import BloomConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.files.hub import find_model_file
from firefly_lightning.files.json_object import read_json_object
from firefly_lightning.files.model_json import CURE, TOKENIZER_FILES, adapter_base, read_config
from firefly_lightning.prompt import SPECIAL_TOKENS, PromptFormat


def load_config(path: str) -> BloomConfig:
    """The configuration of a Bloom; that of its base where an adapter is named.

    Args:
        path: Folder or hub name of the model or the adapter.

    Raises:
        FireflyError: If there is no configuration, or the model is of another architecture.
    """
    if base := base_of(path):
        return load_config(base)
    file = find_model_file(path, "config.json")
    if file is None:
        what = "has no config.json; give a folder that holds a Bloom model"
        if any(Path(path).glob("*.ckpt")):
            what = f"holds a checkpoint; make a model of it: firefly export --checkpoint {path} --out FOLDER"
        raise FireflyError(f"{path}: {what}")
    fields = read_config(file)
    try:
        return BloomConfig.from_dict(fields)
    except Exception as error:  # transformers 5 checks the types of further fields
        raise FireflyError(f"{file}: is no configuration of a Bloom ({reason(error)}); {CURE}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, read from its ``tokenizer.json``; an adapter without one has that of its base.

    Args:
        path: Folder or hub name of the model or the adapter.

    Raises:
        FireflyError: If there is no tokenizer, or it cannot be read.
    """
    if find_model_file(path, "tokenizer.json") is None:
        if base := base_of(path):
            return load_tokenizer(base)
        raise FireflyError(f"{path}: has no tokenizer.json; copy the tokenizer's files there")
    # Fetched here, since transformers would do without a file that the hub does not give out for a moment.
    files = [find_model_file(path, name) for name in TOKENIZER_FILES]
    folder = next(file.parent for file in files if file)
    try:
        # Bloom's tokenizer_config.json names a class of its own, which transformers 5 no longer has: a warning at most.
        with quiet_transformers():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer.name_or_path = path
    except Exception as error:  # tokenizers raises plain Exception
        raise FireflyError(f"{path}: the tokenizer cannot be read ({reason(error)}); fetch it again") from error
    if empty := [name for name in SPECIAL_TOKENS if getattr(tokenizer, name, None) == ""]:
        raise FireflyError(f"{path}: tokenizer_config.json has an empty {empty[0]}; {CURE}")
    return tokenizer


def load_prompt_format(path: str) -> PromptFormat | None:
    """The prompt format that a model was trained with; None where its folder, or that of its base, does not say.

    Args:
        path: Folder or hub name of the model or the adapter.

    Raises:
        FireflyError: If ``prompt_format.json`` is malformed.
    """
    file = find_model_file(path, "prompt_format.json")
    if file is None:
        base = base_of(path)
        return load_prompt_format(base) if base else None
    fields = read_json_object(file, CURE)
    known = asdict(PromptFormat()).keys()
    if fields.keys() - known or not all(isinstance(value, str) for value in fields.values()):
        raise FireflyError(f"{file}: must map {', '.join(known)} to strings, and nothing else")
    try:
        return PromptFormat(**fields)
    except FireflyError as error:
        raise FireflyError(f"{file}: {error}") from error


def base_of(path: str) -> str | None:
    """Folder or hub name of the model that an adapter was made for; None where a whole model is named.

    Args:
        path: Folder or hub name of the adapter or the model.

    Raises:
        FireflyError: If the adapter does not say its base, or the base is not there or an adapter itself.
    """
    base = _adapter_base(path)
    if base is None:
        return None
    cure = f"set base_model_name_or_path in {path}/adapter_config.json"
    try:
        other = _adapter_base(base)
    except FireflyError as error:
        raise FireflyError(f"{path}: is an adapter of {base}, which is not there ({error}); {cure}") from error
    if other is not None:
        raise FireflyError(f"{path}: is an adapter of {base}, which is one too; merge that first, and {cure}")
    return base


def _adapter_base(path: str) -> str | None:
    if not Path(path).is_dir() and find_model_file(path, "config.json"):
        return None
    file = find_model_file(path, "adapter_config.json")
    return adapter_base(file.parent) if file else None


def quiet_peft() -> None:
    """Silences what packages that peft imports say of kernels for other devices; called before it is imported."""
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the warnings of transformers while a model is read whose faults are found here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
