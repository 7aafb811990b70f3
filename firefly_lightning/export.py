"""``firefly export``: from a checkpoint of any strategy to a Hugging Face folder, one of an adapter, or a GGUF."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError, reason, require
from firefly_lightning.files.atomic import check_new_file, check_new_folder, new_folder
from firefly_lightning.files.json_object import read_json_object
from firefly_lightning.files.model_json import CURE, adapter_base

if TYPE_CHECKING:
    from firefly_lightning.gguf.model import Model
    from firefly_lightning.publishing.origin import Origin

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
"""Types of a GGUF's matrices, as llama.cpp calls them."""

Dtype = Literal["float32", "bfloat16", "float16"]


def export(
    checkpoint: str,
    out: str | None = None,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    adapter: bool = False,
    base: str | None = None,
    gguf: str | None = None,
    gguf_type: GgufType = "q8_0",
    verify: str | None = None,
) -> None:
    """Writes a Hugging Face folder, a GGUF for llama.cpp, or both, from a checkpoint, or from an adapter and its base.

    Args:
        checkpoint: A checkpoint, a folder or a file; or the folder of a run, of its checkpoints or of an adapter. With
            ``gguf`` also the Hugging Face folder of a whole model, a pruned one too.
        out: The new folder; it appears complete or not at all.
        dtype: Type of the folder's weights; by default the type that they have in the checkpoint, or in an adapter's
            base.
        max_shard_size: Weights beyond this size are spread over several files.
        adapter: Writes the adapter that was trained, as peft reads it, and does not merge it into its base.
        base: Folder or hub name of the model that an adapter was trained on, where it is not where it was.
        gguf: The new file that llama.cpp reads; it appears complete or not at all.
        gguf_type: Type of the matrices in the file. Embedding and head stay in ``q8_0`` beside types of 4 and 5 bits.
        verify: Instruction rows or a file with a text a line, on which the tokens of the GGUF are proven to be those of
            the model.

    Raises:
        FireflyError: If there is no such checkpoint, it is damaged or not one of Firefly's, an output is in use, the
            base of an adapter is not there or has changed, or llama.cpp cannot have such a model.
    """
    given = Path(checkpoint).expanduser()
    of_adapter = given.is_dir() and adapter_base(given) is not None
    of_model = given.is_dir() and not of_adapter and (given / "config.json").is_file()
    source = given if of_adapter or of_model else find_checkpoint(checkpoint)
    target, file = (Path(name).expanduser() if name is not None else None for name in (out, gguf))
    _check_outputs(source, target, file, verify, of_model)
    if file is None and (verify or gguf_type != "q8_0"):
        raise FireflyError("--verify, --gguf_type: belong to --gguf; name a file there")
    if dtype and target is None:
        raise FireflyError("--dtype: is of the folder; name it with --out, or choose --gguf_type")
    if adapter and file is not None:
        raise FireflyError("--adapter, --gguf: a GGUF is of the whole model; export it without --adapter, by itself")
    if adapter and (of_adapter or of_model):
        raise FireflyError(f"{checkpoint}: is {'an adapter' if of_adapter else 'a model'} already; leave --adapter out")
    if of_model and base:
        raise FireflyError(f"{checkpoint}: is a whole model; leave --base out")
    model: Model | None
    if of_model:
        model = _of_folder(given)
    elif of_adapter:
        with _on_base(given, base) as based:
            model = _in_memory(checkpoint, *_merged(str(based), dtype), [given, base or str(adapter_base(given))])
    else:
        model = _of_checkpoint(source, checkpoint, target, dtype, adapter, base)
    if model is None:
        return
    if target is not None:
        _write_model(target, model, max_shard_size)
    if file is not None:
        from firefly_lightning.gguf.making import make_gguf

        make_gguf(model, file, gguf_type, verify)


def _check_outputs(source: Path, target: Path | None, file: Path | None, verify: str | None, of_model: bool) -> None:
    """Checks that a folder or a file is to be written, and both can be.

    Raises:
        FireflyError: If not.
    """
    if target is None and file is None:
        raise FireflyError("--out, --gguf: neither is given; name a folder, or a file for llama.cpp")
    if target is not None:
        if of_model:
            raise FireflyError(f"{source}: is a plain Hugging Face folder already; leave --out out, or copy it")
        check_new_folder(target, [source])
    if file is not None:
        require("gguf", "gguf")
        if verify and Path(verify).expanduser().is_dir():
            raise FireflyError(f"{verify}: is a folder; name a file of rows, or one with a text a line")
        check_new_file(file, [source, *([verify] if verify else [])])
        if os.path.lexists(file):
            raise FireflyError(f"{file}: is there already; choose another name, or remove it first")


def _of_checkpoint(
    source: Path, checkpoint: str, target: Path | None, dtype: Dtype | None, adapter: bool, base: str | None
) -> "Model | None":
    """The model in a checkpoint; None where the adapter alone was to be written, and is."""
    from firefly_lightning.huggingface import write_description
    from firefly_lightning.publishing.card import write_card
    from firefly_lightning.publishing.origin import origin_of
    from firefly_lightning.strategies.model_of_checkpoint import read_model

    saved = read_model(source)
    origin = origin_of(saved.rest)
    if saved.adapter is None:
        if adapter or base:
            raise FireflyError(f"{checkpoint}: is of a training of all weights; leave --adapter and --base out")
        return _in_memory(checkpoint, saved.description, saved.weights, [source], dtype, origin)
    from transformers import BloomConfig

    from firefly_lightning.model.adapter_folder import write_adapter

    fields, where = saved.adapter["config"], _base(saved.adapter["base"], base)

    def write(folder: Path) -> None:
        write_description({name: text for name, text in saved.description.items() if name != "config.json"}, folder)
        config = BloomConfig.from_dict(saved.description["config.json"])
        write_adapter(folder, fields, saved.weights, config, where)

    if adapter:
        if target is None:
            raise FireflyError("--adapter: is written into a folder; name it with --out")
        with new_folder(target, [source]) as folder:
            write(folder)
            write_card(folder, target.name, saved.weights, saved.description, origin)
        print(f"{target}: an adapter of {where}; talk with both: firefly chat --model {shlex.quote(str(target))}")
        return None
    with TemporaryDirectory() as temporary:
        write(Path(temporary))
        _, weights = _merged(temporary, dtype)
    return _in_memory(checkpoint, saved.description, weights, [source, where], origin=origin)


def _in_memory(
    where: str,
    description: dict[str, Any],
    weights: dict[str, Any],
    inputs: Sequence[Path | str],
    dtype: Dtype | None = None,
    origin: "Origin | None" = None,
) -> "Model":
    """A model whose weights are in memory, or in files that are mapped there."""
    from firefly_lightning.gguf.model import Model
    from firefly_lightning.publishing.origin import Origin

    loads = {name: partial(_cast, weight, dtype) for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Model(where, description, loads, shapes, inputs, origin or Origin())


def _of_folder(folder: Path) -> "Model":
    """The model of a Hugging Face folder, whose weights stay in their files."""
    from firefly_lightning.data.prompt_choice import tokenizer_and_format
    from firefly_lightning.gguf.model import folder_model
    from firefly_lightning.huggingface import check_model, describe

    config = check_model(str(folder))
    tokenizer, prompt = tokenizer_and_format(str(folder))
    description = describe(config, tokenizer, prompt)
    # Its own, since special tokens may have other names and numbers there than in what is trained here.
    own = read_json_object(folder / "config.json", CURE)
    ids = {name: own[name] for name in own if name.endswith("_token_id") and own[name] is not None}
    description["config.json"] |= ids
    settings = folder / "generation_config.json"
    description["generation_config.json"] = read_json_object(settings, CURE) if settings.is_file() else {}
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    description["tokenizer_config.json"] |= {name: getattr(tokenizer, name) for name in names}
    if tokenizer.chat_template:  # its own, also where no prompt format has such a one
        description["tokenizer_config.json"]["chat_template"] = tokenizer.chat_template
    return folder_model(folder, description, bool(config.tie_word_embeddings))


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


def _write_model(out: Path, model: "Model", max_shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    from firefly_lightning.huggingface import write_description
    from firefly_lightning.publishing.card import write_card

    weights = {name: load() for name, load in model.weights.items()}
    description = dict(model.description)
    stored = str(weights["transformer.word_embeddings.weight"].dtype).removeprefix("torch.")
    config = description["config.json"] | {"torch_dtype": stored}
    with new_folder(out, model.inputs) as folder:
        write_description(description | {"config.json": config}, folder)
        write_card(folder, out.name, weights, description, model.origin)
        try:
            save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except ValueError as error:
            raise FireflyError(f"max_shard_size {max_shard_size!r}: write a size such as 5GB or 500MB") from error
        except SafetensorError as error:
            raise FireflyError(f"{out}: {reason(error)}; is the disk full?") from error
    print(f"{out}: a plain Hugging Face folder; talk with it: firefly chat --model {shlex.quote(str(out))}")
