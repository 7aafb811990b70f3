"""Checkpoints that are whole or absent, and the way from one to a Hugging Face folder."""

import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from huggingface_hub import save_torch_state_dict
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from transformers import BloomConfig, BloomForCausalLM
from typing_extensions import override

from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.folders import new_folder
from firefly_lightning.huggingface import DESCRIPTION_FILES, DESCRIPTION_KEY, reason, some, write_description

WEIGHT_PREFIX = "model."
"""What a ``LightningModule`` puts before the names of its ``BloomForCausalLM``."""


def export(
    checkpoint: str,
    out: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a Hugging Face folder from a checkpoint.

    Args:
        checkpoint: A ``.ckpt`` file, or a folder with ``last.ckpt`` in it.
        out: The new folder; it appears complete or not at all.
        dtype: Type of the weights; that of the checkpoint by default.
        max_shard_size: Weights beyond this size are spread over several files.

    Raises:
        FireflyError: If there is no such checkpoint, it is damaged or not one of Firefly's, or ``out`` is in use.
    """
    source = find_checkpoint(checkpoint)
    description, weights = _read_portable(source)
    if dtype is not None:
        weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    stored = weights["transformer.word_embeddings.weight"].dtype
    config = description["config.json"] | {"torch_dtype": str(stored).removeprefix("torch.")}
    with new_folder(Path(out).expanduser()) as folder:
        write_description(description | {"config.json": config}, folder)
        try:
            save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except ValueError as error:
            raise FireflyError(f"max_shard_size {max_shard_size!r}: write a size such as 5GB or 500MB") from error
        except SafetensorError as error:
            raise FireflyError(f"{out}: {reason(error)}; is the disk full?") from error


def find_checkpoint(checkpoint: str) -> Path:
    """The file itself, or the latest ``last*.ckpt`` for a folder and for ``last`` inside it.

    Raises:
        FireflyError: If there is none.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    folder = path.parent if path.name == "last" and not path.exists() else path
    found = sorted(folder.glob("last*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        problem = "holds no last.ckpt; name a checkpoint" if folder.is_dir() else "no such checkpoint; check the path"
        raise FireflyError(f"{checkpoint}: {problem}")
    return found[-1]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, streamed to disk, and in place only when complete: a failed save costs nothing.

    Lightning's own first copies the whole checkpoint in memory, and runs whatever code a loaded file holds.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes beside ``path``, then renames.

        Raises:
            FireflyError: If the disk does not take it; a checkpoint that was there stays as it was.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with _whole_file(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            os_error = _os_error_behind(error)
            if os_error is None:
                raise
            message = describe_os_error(os_error, path)
            raise FireflyError(f"{message}; the checkpoint was not saved, earlier ones are untouched") from error

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads tensors and plain values, and refuses anything that could run code unless ``weights_only`` is False.

        Everything a ``Trainer`` saves for this package is of that kind on every supported release.

        Raises:
            FireflyError: If there is no such file, it is no checkpoint, is damaged, or holds other objects.
        """
        weights_only = weights_only is not False
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        checkpoint = _load(Path(path), map_location, weights_only)
        if "pytorch-lightning_version" not in checkpoint:
            raise FireflyError(f"{path}: is not a checkpoint of a run; name a file that training saved")
        return checkpoint


def _load(path: Path, map_location: Any, weights_only: bool = True) -> dict[str, Any]:
    try:
        # Mapped, so that the processes of one machine share a single copy.
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # RuntimeError, EOFError, KeyError, UnpicklingError, … by where the damage is
        if isinstance(error, OSError) and error.filename:  # cannot be opened; a cut file fails in a nameless seek
            raise FireflyError(describe_os_error(error, path)) from error
        raise FireflyError(f"{path}: {_why_not_loaded(error)}") from error
    if not isinstance(checkpoint, dict):
        raise FireflyError(f"{path}: not a checkpoint; it holds a {type(checkpoint).__name__}")
    return checkpoint


def _why_not_loaded(error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return f"holds {refused[1]}, which could run code; load it with weights_only=False if you trust the file"
    return f"damaged, or not a checkpoint ({reason(error)}); use an earlier one"


def _read_portable(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    checkpoint = _load(path, "cpu")
    missing = [key for key in ("state_dict", DESCRIPTION_KEY) if not isinstance(checkpoint.get(key), dict)]
    missing = missing or [name for name in DESCRIPTION_FILES if name not in checkpoint[DESCRIPTION_KEY]]
    if missing:
        raise FireflyError(f"{path}: not a checkpoint of firefly_lightning; it has no {', '.join(missing)}")
    description = checkpoint[DESCRIPTION_KEY]
    return description, _bloom_weights(checkpoint["state_dict"], description["config.json"], path)


def _bloom_weights(state_dict: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    ours = [name for name in state_dict if name.startswith(WEIGHT_PREFIX)]
    weights = {name.removeprefix(WEIGHT_PREFIX): state_dict[name] for name in ours}
    with torch.device("meta"):
        expected = BloomForCausalLM(BloomConfig.from_dict(config)).state_dict()
    if config["tie_word_embeddings"]:  # the head is the embedding, and is stored once
        weights.pop("lm_head.weight", None)
        del expected["lm_head.weight"]
    for problem, names in (("lacks", expected.keys() - weights.keys()), ("has", weights.keys() - expected.keys())):
        if names:
            raise FireflyError(f"{path}: {problem} {some(sorted(names))}, unlike the model it describes")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            sizes = f"{tuple(weight.shape)}, the model it describes {tuple(expected[name].shape)}"
            raise FireflyError(f"{path}: {name} has the sizes {sizes}")
    return weights


@contextmanager
def _whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``target`` once it is complete and on the disk, and else leaves no trace."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Neither a pattern for checkpoints nor one for visible files matches; a killed save's is overwritten by the next.
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Makes a rename survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error_behind(error: BaseException) -> OSError | None:
    """PyTorch closes its archive after a failed write, fails again, and raises that as a RuntimeError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
