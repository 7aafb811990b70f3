"""firefly export: from a checkpoint of any strategy to a plain Hugging Face folder."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.checkpoints.layout import DESCRIPTION_KEY, MODEL_PREFIX, TRAINER_FILE, WRITER_KEY
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError, reason, some
from firefly_lightning.files.atomic import check_new_folder, new_folder
from firefly_lightning.huggingface import DESCRIPTION_FILES, write_description

READERS = {
    "colossalai": "firefly_lightning.strategies.colossalai.checkpoints",
    "deepspeed": "firefly_lightning.strategies.deepspeed.checkpoints",
    "native": "firefly_lightning.strategies.native.checkpoints",
}
"""Engine that wrote a folder, to the module whose ``read_weights`` reads it; imported only then."""


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
    check_new_folder(Path(out).expanduser(), [source])
    description, weights = _read_portable(source)
    if dtype is not None:
        weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    stored = weights["transformer.word_embeddings.weight"].dtype
    config = description["config.json"] | {"torch_dtype": str(stored).removeprefix("torch.")}
    with new_folder(Path(out).expanduser(), [source]) as folder:
        write_description(description | {"config.json": config}, folder)
        try:
            save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except ValueError as error:
            raise FireflyError(f"max_shard_size {max_shard_size!r}: write a size such as 5GB or 500MB") from error
        except SafetensorError as error:
            raise FireflyError(f"{out}: {reason(error)}; is the disk full?") from error


def _read_portable(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    checkpoint = _read_folder(path) if path.is_dir() else load_file(path, "cpu")
    missing = [key for key in ("state_dict", DESCRIPTION_KEY) if not isinstance(checkpoint.get(key), dict)]
    missing = missing or [name for name in DESCRIPTION_FILES if name not in checkpoint[DESCRIPTION_KEY]]
    if missing:
        raise FireflyError(f"{path}: not a checkpoint of firefly_lightning; it has no {', '.join(missing)}")
    description = checkpoint[DESCRIPTION_KEY]
    return description, _bloom_weights(checkpoint["state_dict"], description["config.json"], path)


def _read_folder(folder: Path) -> dict[str, Any]:
    """The checkpoint of any strategy that saves a folder, in the form of Lightning's own files."""
    if PortableReader.is_at(folder):
        reader = PortableReader(folder)
        return reader.trainer() | {"state_dict": {name: reader.weight(name) for name in reader.names()}}
    trainer = load_file(folder / TRAINER_FILE, "cpu")
    engine = trainer.get(WRITER_KEY, {}).get("engine")
    if engine not in READERS:
        raise FireflyError(f"{folder}: was written by an unknown engine {engine}; export it where it was trained")
    read_weights = import_module(READERS[engine]).read_weights
    return trainer | {"state_dict": read_weights(folder, trainer)}


def _bloom_weights(state_dict: dict[str, Any], config: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    ours = [name for name in state_dict if name.startswith(MODEL_PREFIX)]
    weights = {name.removeprefix(MODEL_PREFIX): state_dict[name] for name in ours}
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
