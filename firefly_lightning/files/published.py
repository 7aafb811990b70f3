"""What of an export is published: its files by name, none that merely lies beside them, and all found whole."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from firefly_lightning.errors import FireflyError, MissingFileError, reason, some, unreadable
from firefly_lightning.files.json_object import read_json_object
from firefly_lightning.files.model_json import (
    CURE,
    TOKENIZER_FILES,
    adapter_base,
    read_config,
    read_generation_config,
    read_index,
)

Kind = Literal["model", "adapter", "GGUF"]

DESCRIPTION = ("config.json", "generation_config.json", "prompt_format.json", "pruning.json", *TOKENIZER_FILES)
"""Files beside the weights of a model that ``firefly export``, ``firefly prune`` and Hugging Face write."""

WEIGHTS, ADAPTER = "model.safetensors", ("adapter_config.json", "adapter_model.safetensors")
INDEX, CARD = f"{WEIGHTS}.index.json", "README.md"

_PICTURE = re.compile(r"[(\"'](?:\./)?([\w-][\w.-]*\.(?:png|svg|jpg))[)\"' ]")
"""A picture beside a card, in Markdown or HTML."""

_SHARD = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_model\.bin")


class Published(NamedTuple):
    """What is published: its kind, files by the names that they get, and what lies beside them and is not."""

    kind: Kind
    files: dict[str, Path]
    left: list[str]


def find_published(source: Path) -> Published:
    """The files of an export, once they are found whole.

    Args:
        source: Folder of a model or an adapter, or a GGUF file.

    Raises:
        FireflyError: If it is none of these, or a file is missing or damaged.
    """
    if source.is_file():
        _check_gguf(source)
        return Published("GGUF", {source.name: source}, [])
    if not source.is_dir():
        raise MissingFileError(f"{source}: no such folder or file; name what firefly export wrote")
    kind: Kind = "model" if adapter_base(source) is None else "adapter"
    weights = _weights_of_model(source) if kind == "model" else [ADAPTER[1]]
    own = (
        (*DESCRIPTION, INDEX) if kind == "model" else ("generation_config.json", "prompt_format.json", *TOKENIZER_FILES)
    )
    names = [*own, *weights, *(ADAPTER if kind == "adapter" else ()), CARD, *pictures(source / CARD)]
    files = {name: source / name for name in dict.fromkeys(names) if (source / name).is_file()}
    _check_description(source, kind, files)
    _check_weights(source, weights)
    return Published(kind, files, sorted(path.name for path in source.iterdir() if path.name not in files))


def pictures(card: Path) -> list[str]:
    """Names of the pictures beside a card that it shows; none where there is no card."""
    try:
        return _PICTURE.findall(card.read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise FireflyError(f"{card}: cannot be read ({reason(error)}); save it in UTF-8") from error


def stale(there: list[str], files: Mapping[str, Path]) -> list[str]:
    """Names of files of an earlier model that would be read with, or instead of, those that are published now.

    Args:
        there: Names of the files of the repository.
        files: What is published.
    """
    return sorted(name for name in there if name not in files and (name in DESCRIPTION or _SHARD.fullmatch(name)))


def _weights_of_model(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return read_index(folder / INDEX)
    if any(folder.glob("*.ckpt")) or any(folder.glob("trainer.ckpt")):
        raise FireflyError(f"{folder}: holds a checkpoint; make a model of it: firefly export --checkpoint {folder}")
    raise MissingFileError(f"{folder}: has no {WEIGHTS}; push a folder that firefly export wrote")


def _check_description(folder: Path, kind: Kind, files: Mapping[str, Path]) -> None:
    if kind == "model":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            if name not in files:
                raise MissingFileError(f"{folder}: has no {name}; push a folder that firefly export wrote")
        read_config(files["config.json"])
    if file := files.get("generation_config.json"):
        read_generation_config(file)
    for name, file in files.items():
        if name.endswith(".json"):
            read_json_object(file, CURE)


def _check_weights(folder: Path, names: list[str]) -> None:
    """Checks that the files of weights are whole, and hold what their index says.

    Raises:
        FireflyError: If not.
    """
    held: set[tuple[str, str]] = set()
    for name in names:
        file = folder / name
        if not file.is_file():
            raise MissingFileError(f"{folder}: has no {name}; push a folder that firefly export wrote")
        try:
            with safe_open(file, framework="numpy") as tensors:  # compares the file's size with its header
                held |= {(weight, name) for weight in tensors.keys()}  # noqa: SIM118  (no mapping)
        except OSError as error:
            raise unreadable(error, file) from error
        except SafetensorError as error:
            raise FireflyError(f"{file}: is no complete safetensors file ({reason(error)}); export it again") from error
    if not held:
        raise FireflyError(f"{folder}: its weights are empty; export it again")
    if WEIGHTS not in names and (index := folder / INDEX).is_file():
        listed = read_json_object(index, CURE)["weight_map"]
        if missing := sorted(weight for weight, name in listed.items() if (weight, name) not in held):
            raise FireflyError(f"{index}: its files lack {some(missing)}; export the model again")


def _check_gguf(file: Path) -> None:
    """Checks that a file begins as a GGUF does: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises:
        FireflyError: If not.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(24)
    except OSError as error:
        raise unreadable(error, file) from error
    if start[:4] != b"GGUF" or len(start) < 24 or int.from_bytes(start[4:8], "little") not in (2, 3):
        raise FireflyError(f"{file}: is no GGUF, nor a folder; name what firefly export wrote")
    if file.suffix != ".gguf":
        raise FireflyError(f"{file}: llama.cpp looks for names that end in .gguf; rename it")
