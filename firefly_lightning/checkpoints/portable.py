"""The portable checkpoint: a folder that every strategy writes and reads, on any number of processes."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from firefly_lightning.checkpoints.contents import DAMAGED, OF_A_RUN, check_contents
from firefly_lightning.checkpoints.layout import (
    FILES_KEY,
    FORMAT,
    INDEX,
    MANIFEST,
    MODEL,
    MODULE,
    OPTIMIZER,
    SCALARS_KEY,
    TIED_KEY,
    TRAINER_FILE,
    WEIGHT,
    is_tensor_file,
    kind_of,
    name_in_module,
    stored_name,
    tensor_file,
)
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.files.manifest import (
    FileEntry,
    check_files,
    check_listed,
    entry_of,
    listed_files,
    read_manifest,
    write_manifest,
)

FLUSH_BYTES = 256 * 2**20
"""Bytes of pending tensors at which a process writes them to a file; a single tensor may be larger."""

States = dict[str, Tensor]
"""A parameter's unsharded tensors: its weight under :data:`WEIGHT`, the optimizer's, of any shape, by their keys."""


class PortableWriter:
    """Writes one process's share of the tensors of a checkpoint.

    Args:
        folder: Folder of the checkpoint, under its temporary name.
        rank: Number of this process, which is part of the names of its files.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._pending: dict[str, dict[str, Tensor]] = {MODEL: {}, MODULE: {}, OPTIMIZER: {}}
        self._files: dict[str, FileEntry] = {}

    def add(self, name: str, states: Mapping[str, Tensor]) -> None:
        """Adds the tensors of one parameter.

        Args:
            name: Name of the parameter in the ``LightningModule``.
            states: The parameter's weight and states of the optimizer, by key; see :data:`States`.
        """
        for key, tensor in states.items():
            kind, stored = stored_name(key, name)
            pending = self._pending[kind]
            pending[stored] = tensor.detach().cpu()
            if sum(tensor.nbytes for tensor in pending.values()) >= FLUSH_BYTES:
                self._flush(kind)

    def close(self) -> dict[str, FileEntry]:
        """Writes the tensors that are still pending; returns the entry of each file that was written, by its name."""
        for kind in self._pending:
            self._flush(kind)
        return self._files

    def _flush(self, kind: str) -> None:
        pending, self._pending[kind] = self._pending[kind], {}
        if not pending:
            return
        count = sum(kind_of(name) == kind for name in self._files)
        path = self._folder / tensor_file(kind, self._rank, count)
        tensors = _each_alone(pending)
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):  # only the error's text has the system's answer
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            raise
        self._files[path.name] = entry_of(path) | {"tensors": {name: tensor.nbytes for name, tensor in tensors.items()}}


def _each_alone(pending: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as those may that an optimizer keeps for all parameters."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in pending.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return tensors


def finish(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Adds index and manifest to a checkpoint that has all its other files; one process does so, last.

    Args:
        folder: Folder of the checkpoint, under its temporary name.
        files: The entries that the writers of all processes returned, by name of the file.
    """
    tensors = {file: entry["tensors"] for file, entry in files.items() if kind_of(file) == MODEL}
    weight_map = {name: file for file, sizes in tensors.items() for name in sizes}
    size = sum(sum(sizes.values()) for sizes in tensors.values())
    # With the digests the index belongs to these very weights: that of another checkpoint of the run would be the same.
    metadata = {"total_size": size, "xxh3_128": {file: files[file]["xxh3_128"] for file in sorted(tensors)}}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    written = {name: entry_of(folder / name) for name in (TRAINER_FILE, INDEX)}
    write_manifest(folder / MANIFEST, {**files, **written}, format=FORMAT)


class PortableReader:
    """A complete and undamaged portable checkpoint; tensors are read when they are asked for.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        MissingFileError: If a file is missing; the message names it.
        FireflyError: If a file is cut or changed, which the message names, or the format is of a later release.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _check(folder)
        self._where = {
            (kind, name): file
            for file in self._files
            if (kind := kind_of(file))
            for name in self._open(file).keys()  # noqa: SIM118  (no mapping)
        }
        self._keys: dict[str, list[str]] = {}
        for key, _, name in (name.partition("/") for kind, name in self._where if kind == OPTIMIZER):
            self._keys.setdefault(name, []).append(key)

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether there is a portable checkpoint, whole or damaged, at a path."""
        return (path / MANIFEST).is_file() or (path / INDEX).is_file()

    def trainer(self) -> dict[str, Any]:
        """All that Lightning saved except weights and optimizer states.

        Raises:
            FireflyError: If it is not what a run saves, or belongs to other files than those of this checkpoint.
        """
        file = self.folder / TRAINER_FILE
        trainer = load_file(file, "cpu")
        check_contents(trainer, file, required=(*OF_A_RUN, TIED_KEY, SCALARS_KEY))
        others = set(self._files) - {TRAINER_FILE, INDEX}
        weights = set(self.names())
        if set(trainer.get(FILES_KEY, others)) != others or not weights >= set(trainer[TIED_KEY].values()):
            raise FireflyError(f"{file}: is not of the other files of this checkpoint; {DAMAGED}")
        return trainer

    def names(self) -> list[str]:
        """Names of all weights in the ``LightningModule``; of a weight that has two names, the first."""
        return [name_in_module(kind, name) for kind, name in self._where if kind != OPTIMIZER]

    def weight(self, name: str) -> Tensor:
        """The weight of a given name in the ``LightningModule``.

        Raises:
            FireflyError: If the checkpoint has no weight of that name.
        """
        return self._read(WEIGHT, name, f"the weight {name}")

    def keys(self, name: str) -> list[str]:
        """Keys of the tensors that the optimizer had for a parameter, such as ``exp_avg``; none for a frozen one."""
        return self._keys.get(name, [])

    def states_like_weights(self) -> Iterator[tuple[int, list[str]]]:
        """For each weight that the optimizer had states of, its number of dimensions and the keys of these states.

        Raises:
            FireflyError: If a state has another shape than its weight, so that it cannot be split like the weight.
        """
        for name, keys in self._keys.items():
            shape = self._shape(WEIGHT, name)
            for key in keys:
                if self._shape(key, name) != shape:
                    raise FireflyError(
                        f"{self.folder}: the optimizer's {key} of {name} is not shaped like the weight, and cannot be "
                        "split; resume under auto or ddp, or export the model and train it anew"
                    )
            yield len(shape), keys

    def state(self, key: str, name: str) -> Tensor:
        """The optimizer's state of the given key, such as ``exp_avg``, for the parameter of the given name.

        Raises:
            FireflyError: If the optimizer that was saved has no such state.
        """
        return self._read(key, name, f"the optimizer's {key} of {name}; resume with its optimizer")

    def _shape(self, key: str, name: str) -> list[int]:
        kind, stored = stored_name(key, name)
        if (kind, stored) not in self._where:
            return []
        shape: list[int] = self._open(self._where[kind, stored]).get_slice(stored).get_shape()
        return shape

    def _read(self, key: str, name: str, what: str) -> Tensor:
        kind, stored = stored_name(key, name)
        file = self._where.get((kind, stored))
        if file is None:
            raise FireflyError(f"{self.folder}: lacks {what}")
        tensor: Tensor = self._open(file).get_tensor(stored)
        return tensor

    @cache  # noqa: B019  (a reader lives as long as its files are open)
    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FireflyError(f"{self.folder / file}: damaged ({reason(error)}); use an earlier one") from error


def _check(folder: Path) -> list[str]:
    """Names of the files of a checkpoint that is whole."""
    path = folder / MANIFEST
    manifest = read_manifest(path, DAMAGED)
    if (version := manifest.get("format")) != FORMAT:
        raise FireflyError(f"{path}: is of format {version!r:.20}; this release reads {FORMAT}, take a later one")
    entries = listed_files(path, manifest, DAMAGED)
    if others := [name for name in entries if name not in (TRAINER_FILE, INDEX) and not is_tensor_file(name)]:
        raise FireflyError(f"{path}: lists {others[0][:80]!r}, which no checkpoint has; {DAMAGED}")
    check_listed(path, entries, [TRAINER_FILE, INDEX], DAMAGED)
    check_listed(path, entries, (file.name for file in folder.iterdir() if is_tensor_file(file.name)), DAMAGED)
    check_files(folder, entries, DAMAGED)
    return list(entries)
