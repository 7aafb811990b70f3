"""The portable checkpoint: a folder that every strategy writes and reads, on any number of processes."""

import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firefly_lightning.checkpoints.contents import DAMAGED, OF_A_RUN, check_contents
from firefly_lightning.checkpoints.host_copies import HostCopies, bytes_of
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
from firefly_lightning.checkpoints.shared_checks import once_a_machine
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.files.direct_io import THREADS, Bytes
from firefly_lightning.files.manifest import (
    FileEntry,
    check_files,
    check_listed,
    entry_of,
    listed_files,
    read_manifest,
    write_entry,
    write_manifest,
)
from firefly_lightning.files.safetensors_header import NAMES, Entry, header, widest_first

FLUSH_BYTES = 256 * 2**20
"""Bytes of pending tensors at which a process writes them to a file; a single tensor may be larger."""

States = dict[str, Tensor]
"""A parameter's unsharded tensors: its weight under :data:`WEIGHT`, the optimizer's, of any shape, by their keys."""


class StoredTensor(NamedTuple):
    """A tensor as a file has it.

    Attributes:
        entry: What the header of the file says of it.
        parts: Its bytes, in order.
    """

    entry: Entry
    parts: list[Bytes]


class PortableWriter:
    """Writes one process's share of the tensors of a checkpoint.

    A full file is written while the tensors of the next are collected; or, where tensors are copied aside, all files
    are written by :meth:`close`, which another thread may call.

    Args:
        folder: Folder of the checkpoint, under its temporary name.
        rank: Number of this process, which is part of the names of its files.
        copies: Memory into which tensors are copied, if they change before they are written.
    """

    def __init__(self, folder: Path, rank: int, copies: HostCopies | None = None) -> None:
        self._folder, self._rank, self._copies = folder, rank, copies
        self._pending: dict[str, dict[str, StoredTensor]] = {MODEL: {}, MODULE: {}, OPTIMIZER: {}}
        self._later: list[tuple[str, dict[str, StoredTensor]]] = []
        self._files: dict[str, FileEntry] = {}
        self._pool, self._writers = ThreadPoolExecutor(1), ThreadPoolExecutor(THREADS)
        self._writing: Future[None] | None = None
        self.names: list[str] = []

    def add(self, name: str, states: Mapping[str, Tensor]) -> None:
        """Adds the tensors of one parameter.

        Args:
            name: Name of the parameter in the ``LightningModule``.
            states: The parameter's weight and states of the optimizer, by key; see :data:`States`.
        """
        for key, tensor in states.items():
            kind, stored = stored_name(key, name)
            pending = self._pending[kind]
            pending[stored] = self._stored(tensor, stored)
            if sum(tensor.entry.size for tensor in pending.values()) >= FLUSH_BYTES:
                self._flush(kind)

    def finish_adding(self) -> None:
        """Says that no more tensors come; :attr:`names` are then the names of all files."""
        for kind in self._pending:
            self._flush(kind)
        if self._copies:
            self._copies.finish()

    def close(self) -> dict[str, FileEntry]:
        """Writes what has not been written yet; returns the entry of each file, by its name."""
        for name, tensors in self._later:
            self._write(name, tensors)
        if self._writing:
            self._writing.result()
        self._pool.shutdown()
        self._writers.shutdown()
        return self._files

    def _stored(self, tensor: Tensor, name: str) -> StoredTensor:
        if tensor.dtype not in NAMES:
            raise FireflyError(f"{name}: is of {tensor.dtype}, which safetensors has no name for; convert it")
        parts = self._copies.take(tensor) if self._copies else [bytes_of(tensor)]
        return StoredTensor(Entry(NAMES[tensor.dtype], tensor.shape, tensor.nbytes), parts)

    def _flush(self, kind: str) -> None:
        pending, self._pending[kind] = self._pending[kind], {}
        if not pending:
            return
        name = tensor_file(kind, self._rank, sum(kind_of(name) == kind for name in self.names))
        self.names.append(name)
        if self._copies:
            self._later.append((name, pending))
            return
        if self._writing:
            self._writing.result()
        self._writing = self._pool.submit(self._write, name, pending)

    def _write(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        order = widest_first({name: tensor.entry for name, tensor in tensors.items()})
        head = header({name: tensors[name].entry for name in order})
        parts = [np.frombuffer(head, np.uint8), *(part for name in order for part in tensors[name].parts)]
        sizes = {name: tensors[name].entry.size for name in order}
        self._files[name] = write_entry(self._folder / name, parts, self._writers) | {"tensors": sizes}


def as_file(trainer: Mapping[str, Any]) -> bytes:
    """The contents of ``trainer.ckpt`` as bytes, which do not change with what they are made from."""
    file = io.BytesIO()
    torch.save(dict(trainer), file)
    return file.getvalue()


def finish(folder: Path, files: Mapping[str, FileEntry], trainer: bytes) -> None:
    """Adds ``trainer.ckpt``, index and manifest to a checkpoint that has all its tensors; one process does so, last.

    Args:
        folder: Folder of the checkpoint, under its temporary name.
        files: The entries that the writers of all processes returned, by name of the file.
        trainer: What :func:`as_file` gave.
    """
    (folder / TRAINER_FILE).write_bytes(trainer)
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
        self._opened: dict[str, Any] = {}
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

    def _open(self, file: str) -> Any:
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            return self._opened[file]
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
    check_files(folder, entries, DAMAGED, once_a_machine)
    return list(entries)
