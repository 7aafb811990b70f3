"""Files of a model, in a folder or of the Hugging Face hub, and in one line each what a hub can answer."""

import errno
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from firefly_lightning.errors import FireflyError, reason

Answer = TypeVar("Answer")

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""Names of the hub, with an owner: no Bloom has one without, and a mistyped folder should not wait for the network."""

NOT_ASKED = "the hub is not asked, since HF_HUB_OFFLINE is set, nor is it in the cache; unset that to fetch it"

_HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "httpx2")
"""What huggingface_hub asks with, by its release: errors of theirs that are no answers are those of a connection."""

_NOT_REACHED = ("ConnectError", "ConnectTimeout", "MaxRetryError", "ProxyError", "ReadTimeout")
"""Names of their errors before anything was on its way; after a timeout huggingface_hub has tried again itself."""

_PAUSES = (1.0, 3.0)
"""Seconds before a download whose connection was cut goes on."""

_DESCRIPTIONS = ("config.json", "adapter_config.json", "tokenizer.json")
_WEIGHTS = (
    *(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")),
    "adapter_model.safetensors",
)


def find_model_file(path: str, name: str) -> Path | None:
    """One file of a folder or of a hub model, downloaded if need be; None if it has no such file.

    Raises:
        FireflyError: If ``path`` is neither a folder nor a model that the hub gives out.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    if not HUB_NAME.fullmatch(path):
        raise FireflyError(f"{path}: no such folder; check the path and the working folder")
    return _find_hub_file(path, name)


@lru_cache(maxsize=256)  # a process asks for some files often, and each time the hub would be asked
def _find_hub_file(path: str, name: str) -> Path | None:
    try:
        return Path(patiently(lambda: hf_hub_download(path, name)))
    except Exception as error:  # of many types, by what the network and the hub answer
        if _lacks_file(path, error):
            return None
        problem = hub_problem(error, path) or f"the hub does not give it out ({reason(error)})"
        raise FireflyError(f"{path}: no such folder here, and {problem}") from error


def patiently(download: Callable[[], Answer]) -> Answer:
    """What a download gives, begun again where its connection was cut; the library goes on from what it has.

    Args:
        download: Downloads with huggingface_hub, or does nothing where that is done.
    """
    for pause in _PAUSES:
        try:
            return download()
        except Exception as error:
            if not _was_cut(error):
                raise
        time.sleep(pause)
    return download()


def hub_problem(error: BaseException, name: str) -> str | None:
    """What a hub or the way to it has answered, and what to do; None for an error of another kind.

    Args:
        error: What huggingface_hub, or a library above it, has raised.
        name: Name of the repository.
    """
    hub, causes = constants.ENDPOINT, list(_causes(error))
    for one in causes:
        if isinstance(one, OfflineModeIsEnabled):
            return NOT_ASKED
        if isinstance(one, GatedRepoError):
            return f"its owner gives it out on request; ask on {hub}/{name}, then log in with hf auth login"
        if isinstance(one, RevisionNotFoundError):
            return f"the hub has no such branch or commit of it; look at {hub}/{name}"
        if isinstance(one, RepositoryNotFoundError):
            return f"{hub} has nothing of this name, or it is private; check the name, or log in with hf auth login"
        if isinstance(one, FileMetadataError | JSONDecodeError):
            return f"{hub} does not answer as a hub does; check HF_ENDPOINT, and what stands between here and there"
        if answer := _answer(one):
            return f"{hub} answered {answer}"
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full; free some space, or set HF_HOME to a folder on another disk for the hub's cache"
        if isinstance(one, OSError) and one.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR) and one.filename:
            return f"{one.filename} cannot be written; set HF_HOME to a folder of yours for the hub's cache"
        if _is_of_connection(one):
            root = reason(causes[-1])  # libraries wrap it in ever longer words
            if _was_cut(error):
                return f"the connection to {hub} was cut ({root}); try again, what is complete is kept"
            return f"{hub} cannot be reached ({root}); check the network, or set HF_ENDPOINT to a mirror"
    return None


_CURES = {
    400: "mend what it says",
    401: "it does not take your token; run hf auth login anew, or set HF_TOKEN to another",
    402: "it wants a payment first; look at your account there",
    403: "your token or account may not do this; take one with the right to",
    409: "it is there already, or is just being changed; look at it, and try again",
    412: "somebody else has changed it meanwhile; look at it, and try again",
    429: "it wants fewer requests; wait some minutes, or log in with hf auth login",
}


def _answer(error: BaseException) -> str | None:
    """Status and words of the answer that an error is about, and what to do; None where there was no answer."""
    response = getattr(error, "response", None)  # also in errors of the HTTP libraries
    if response is None:
        return None
    status = response.status_code
    words = getattr(error, "server_message", None) or response.headers.get("X-Error-Message") or ""
    told = f" ({' '.join(words.split())[:160]})" if words else ""
    return f"{status}{told}; {_CURES.get(status) or ('try again later' if status >= 500 else 'look at it there')}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, the last first."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _is_of_connection(error: BaseException) -> bool:
    library = type(error).__module__.partition(".")[0]
    return library in _HTTP_LIBRARIES or (isinstance(error, ConnectionError) and error.errno is not None)


def _was_cut(error: BaseException) -> bool:
    """Whether a connection broke while something was on its way; not whether the hub has answered or was not there."""
    causes = list(_causes(error))
    if any(_answer(one) or type(one).__name__ in _NOT_REACHED for one in causes):
        return False
    return any(_is_of_connection(one) or str(one).startswith("Consistency check failed") for one in causes)


def _lacks_file(path: str, error: Exception) -> bool:
    """Whether a failed download means that the model has no such file.

    Where the hub is not asked, a model of the cache has what is there. Where it should be asked and cannot be reached,
    that holds for one with its weights alone, which come last; and an answer such as 500 says nothing of the file.
    """
    if not isinstance(error, LocalEntryNotFoundError):
        return isinstance(error, EntryNotFoundError)
    causes = list(_causes(error))[1:]
    offline = any(isinstance(one, OfflineModeIsEnabled) for one in causes)
    if any(map(_answer, causes)):
        return False
    needed = (*_DESCRIPTIONS, *_WEIGHTS) if offline else _WEIGHTS
    return any(isinstance(try_to_load_from_cache(path, name), str) for name in needed)
