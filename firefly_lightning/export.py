"""``firefly export``: from a checkpoint of any strategy to a plain Hugging Face folder, or to one of an adapter."""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.files.atomic import check_new_folder, new_folder
from firefly_lightning.files.json_object import read_json_object
from firefly_lightning.files.model_json import CURE, adapter_base

Dtype = Literal["float32", "bfloat16", "float16"]


def export(
    checkpoint: str,
    out: str,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    adapter: bool = False,
    base: str | None = None,
) -> None:
    """Writes a Hugging Face folder from a checkpoint, or from an adapter and its base.

    Args:
        checkpoint: A checkpoint, a folder or a file; or the folder of a run, of its checkpoints or of an adapter.
        out: The new folder; it appears complete or not at all.
        dtype: Type of the weights; by default the type that they have in the checkpoint, or in an adapter's base.
        max_shard_size: Weights beyond this size are spread over several files.
        adapter: Writes the adapter that was trained, as peft reads it, and does not merge it into its base.
        base: Folder or hub name of the model that an adapter was trained on, where it is not where it was.

    Raises:
        FireflyError: If there is no such checkpoint, it is damaged or not one of Firefly's, ``out`` is in use, or the
            base of an adapter is not there or has changed.
    """
    given, target = Path(checkpoint).expanduser(), Path(out).expanduser()
    of_folder = given.is_dir() and adapter_base(given) is not None
    source = given if of_folder else find_checkpoint(checkpoint)
    check_new_folder(target, [source])
    if of_folder:
        if adapter:
            raise FireflyError(f"{checkpoint}: is an adapter already; leave --adapter out to merge it")
        with _on_base(source, base) as based:
            _write_model(target, [source, *([base] if base else [])], *_merged(str(based), dtype), max_shard_size)
        return
    from firefly_lightning.huggingface import write_description
    from firefly_lightning.strategies.model_of_checkpoint import read_model

    saved = read_model(source)
    if saved.adapter is None:
        if adapter or base:
            raise FireflyError(f"{checkpoint}: is of a training of all weights; leave --adapter and --base out")
        weights = {name: _cast(weight, dtype) for name, weight in saved.weights.items()}
        _write_model(target, [source], saved.description, weights, max_shard_size)
        return
    from transformers import BloomConfig

    from firefly_lightning.model.adapter_folder import write_adapter

    fields, where = saved.adapter["config"], _base(saved.adapter["base"], base)

    def write(folder: Path) -> None:
        write_description({name: text for name, text in saved.description.items() if name != "config.json"}, folder)
        config = BloomConfig.from_dict(saved.description["config.json"])
        write_adapter(folder, fields, saved.weights, config, where)

    if adapter:
        with new_folder(target, [source]) as folder:
            write(folder)
        print(f"{out}: an adapter of {where}; talk with both: firefly chat --model {shlex.quote(out)}")
        return
    with TemporaryDirectory() as temporary:
        write(Path(temporary))
        _, weights = _merged(temporary, dtype)
    _write_model(target, [source, where], saved.description, weights, max_shard_size)


def _base(recorded: Mapping[str, str], told: str | None) -> str:
    """Folder or hub name of the base of a checkpoint's adapter.

    Raises:
        FireflyError: If it is not there, or not the model that the adapter was trained on.
    """
    from firefly_lightning.huggingface import digest_of_weights

    where = told or recorded["path"]
    try:
        digest = digest_of_weights(where)
    except FireflyError as error:
        if told:
            raise
        raise FireflyError(f"{where}: the base of the adapter is not there; name its place with --base") from error
    if digest != recorded["xxh3_128"]:
        raise FireflyError(f"{where}: has other weights than the adapter was trained on; name that model with --base")
    return where


@contextmanager
def _on_base(folder: Path, base: str | None) -> Iterator[Path]:
    """The folder of an adapter, or where another base is named, one that names that, while it is merged."""
    if base is None:
        yield folder
        return
    from firefly_lightning.huggingface import check_model

    check_model(base)
    where = str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base
    with TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            (Path(temporary) / file.name).symlink_to(file.resolve())
        config = Path(temporary) / "adapter_config.json"
        fields = read_json_object(config, CURE) | {"base_model_name_or_path": where}
        config.unlink()
        config.write_text(json.dumps(fields, ensure_ascii=False), "utf-8")
        yield Path(temporary)


def _merged(path: str, dtype: Dtype | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and the weights of an adapter's base with the adapter merged into it."""
    import torch

    from firefly_lightning.data.prompt_choice import tokenizer_and_format
    from firefly_lightning.huggingface import describe, load_bloom, stored_dtype

    bloom = load_bloom(path, getattr(torch, dtype) if dtype else stored_dtype(path))
    description = describe(bloom.config, *tokenizer_and_format(path))
    weights = bloom.state_dict()
    if bloom.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return description | {"generation_config.json": bloom.generation_config.to_diff_dict()}, weights


def _cast(weight: Any, dtype: Dtype | None) -> Any:
    import torch

    return weight if dtype is None else weight.to(getattr(torch, dtype))


def _write_model(
    out: Path, inputs: list[Path | str], description: dict[str, Any], weights: dict[str, Any], max_shard_size: str
) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    from firefly_lightning.huggingface import write_description

    stored = str(weights["transformer.word_embeddings.weight"].dtype).removeprefix("torch.")
    config = description["config.json"] | {"torch_dtype": stored}
    with new_folder(out, inputs) as folder:
        write_description(description | {"config.json": config}, folder)
        try:
            save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except ValueError as error:
            raise FireflyError(f"max_shard_size {max_shard_size!r}: write a size such as 5GB or 500MB") from error
        except SafetensorError as error:
            raise FireflyError(f"{out}: {reason(error)}; is the disk full?") from error
    print(f"{out}: a plain Hugging Face folder; talk with it: firefly chat --model {shlex.quote(str(out))}")
