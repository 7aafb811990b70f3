"""``firefly export``: from a checkpoint of any strategy to a plain Hugging Face folder."""

import shlex
from pathlib import Path
from typing import Literal

from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.files.atomic import check_new_folder, new_folder


def export(
    checkpoint: str,
    out: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a Hugging Face folder from a checkpoint.

    Args:
        checkpoint: A checkpoint, which is a folder or a file, or the folder of a run or of its checkpoints.
        out: The new folder; it appears complete or not at all.
        dtype: Type of the weights; the type that they have in the checkpoint by default.
        max_shard_size: Weights beyond this size are spread over several files.

    Raises:
        FireflyError: If there is no such checkpoint, it is damaged or not one of Firefly's, or ``out`` is in use.
    """
    source = find_checkpoint(checkpoint)
    check_new_folder(Path(out).expanduser(), [source])
    import torch
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    from firefly_lightning.huggingface import write_description
    from firefly_lightning.strategies.model_of_checkpoint import read_model

    description, weights = read_model(source)
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
    print(f"{out}: a plain Hugging Face folder; talk with it: firefly chat --model {shlex.quote(out)}")
