"""Files of a model, in a folder or of the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from firefly_lightning.errors import FireflyError, reason


def find_model_file(path: str, name: str) -> Path | None:
    """One file of a folder or of a hub model, downloaded if need be; None if it has no such file.

    Raises:
        FireflyError: If ``path`` is neither a folder nor a model that the hub gives out.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    # No Bloom has a hub name without an owner; a mistyped folder should not wait for the network.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise FireflyError(f"{path}: no such folder; check the path and the working folder")
    try:
        return Path(hf_hub_download(path, name))
    except Exception as error:  # of many types, by what the network and the hub answer
        if _lacks_file(path, error):
            return None
        raise FireflyError(f"{path}: neither a folder nor a model the hub gives out ({reason(error)})") from error


def _lacks_file(path: str, error: Exception) -> bool:
    """Whether a failed download means that the model has no such file; off line, it does if the model is cached."""
    if isinstance(error, LocalEntryNotFoundError):
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    return isinstance(error, EntryNotFoundError)
