"""Checkpoints of strategies that hold a model in parts: portable checkpoints, and those in an engine's own form."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.layout import (
    DIGESTED_KEY,
    FILES_KEY,
    SCALARS_KEY,
    SCALER_KEY,
    TENSOR_KEYS,
    TIED_KEY,
    TRAINER_FILE,
    WEIGHT,
    WRITER_KEY,
)
from firefly_lightning.checkpoints.own_form import files_of, finish_own, read_own
from firefly_lightning.checkpoints.portable import PortableReader, PortableWriter, States, as_file, finish
from firefly_lightning.checkpoints.shares import entries_file, leave_entries, take_entries
from firefly_lightning.checkpoints.unsharded import saved_parameters
from firefly_lightning.errors import FireflyError, MissingFileError
from firefly_lightning.files.atomic import partial_path, whole_folder
from firefly_lightning.files.manifest import FileEntry, entry_of
from firefly_lightning.strategies.agreement import agreed, from_all


class ShardedCheckpoints(Strategy):
    """Mixed into a strategy that shards: saves and loads its checkpoints, each a folder that is whole or absent.

    Any strategy resumes from a portable checkpoint, and only the same strategy on as many processes from one in the
    engine's own form. The ``portable`` of the trainer's ``AtomicCheckpointIO`` says which kind is written.
    """

    _reader: PortableReader | None = None

    @abstractmethod
    def portable_states(self) -> Iterator[tuple[str, States]]:
        """Yields every parameter once: its name in the ``LightningModule``, its weight and its optimizer states.

        All processes call this together, and each gets every tensor whole, in memory of its own that the next parameter
        does not reuse. Weights are the float32 masters where there are any, without rows that only pad the vocabulary.
        Optimizer states are there only while fitting.
        """

    @abstractmethod
    def optimizer_scalars(self) -> dict[str, Any]:
        """Numbers that the optimizer counts for a parameter, by key, the same for all that it updates; none before."""

    @abstractmethod
    def load_portable(self, reader: PortableReader, fitting: bool) -> None:
        """Sets what :meth:`portable_states` gave, whichever strategy saved it; called by all processes.

        Args:
            reader: Reads the checkpoint; each process reads whole tensors and keeps its part of them.
            fitting: Whether there is an optimizer; its states and number of steps are then set too.
        """

    def scaler_state(self) -> dict[str, Any]:
        """What the scaler of the loss has learned, by the keys of ``GradScaler``; empty where no loss is scaled."""
        return {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Sets the state that :meth:`scaler_state` of any strategy gave, or that a ``GradScaler`` saved."""

    def whole_tensors(self) -> dict[str, Tensor]:
        """Tensors to save, by name, that every process holds whole and that are not parameters: the buffers."""
        return dict(_kept_buffers(self.lightning_module))

    @abstractmethod
    def save_shards(self, folder: Path) -> None:
        """Writes weights and, while fitting, optimizer states in the engine's own form; all processes call it together.

        Args:
            folder: The folder to write into, the same for all processes.
        """

    @abstractmethod
    def load_shards(self, folder: Path, fitting: bool) -> None:
        """Reads what :meth:`save_shards` wrote; all processes call it together.

        Args:
            folder: The folder that was written.
            fitting: Whether to read the optimizer states too.
        """

    @abstractmethod
    def writer(self) -> dict[str, Any]:
        """Settings, by name, that must be the same when a checkpoint in the engine's own form is read: plain values."""

    @property
    def saves_portable(self) -> bool:
        """Whether saved checkpoints are portable; they are unless the trainer's plugin says otherwise."""
        io = self.checkpoint_io
        return io.portable if isinstance(io, AtomicCheckpointIO) else True

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Fills a hidden folder beside ``filepath``, then renames it to ``filepath``.

        Gathering is collective and belongs to the thread of the training. Where saves are asynchronous, each process
        writes its share in another thread, and tells the first process by a file, since two threads must not use the
        collectives of one group.
        """
        target = Path(self.broadcast(str(filepath)))
        io = self.checkpoint_io
        if isinstance(io, AtomicCheckpointIO):
            io.begin(agreed)
        with ExitStack() as folder:  # the first process makes the folder and renames it; all fill it
            self._on_first(lambda: folder.enter_context(whole_folder(target)))
            partial = partial_path(target)
            kept = self._without_tensors(checkpoint)
            if isinstance(io, AtomicCheckpointIO) and io.saves_aside:
                self._begin(io, target, kept, folder)
                return
            complete = self._portable(partial, kept) if self.saves_portable else self._own(partial, kept)

            def close() -> None:
                complete()
                folder.close()

            self._on_first(close)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what Lightning saved; weights and optimizer states are read later, in :meth:`load_model_state_dict`.

        Raises:
            MissingFileError: If there is no checkpoint at that path.
            FireflyError: If it is not a checkpoint of this strategy or a portable one, or if it is in the engine's own
                form and was saved by another strategy or number of processes.
        """
        self._folder = Path(checkpoint_path)
        self._reader = None
        if not self._folder.exists():
            raise MissingFileError(f"{checkpoint_path}: no such checkpoint; check the path")
        if PortableReader.is_at(self._folder):
            self._reader = agreed(lambda: PortableReader(self._folder))
            return self._reader.trainer()
        if not (self._folder / TRAINER_FILE).is_file():
            raise FireflyError(f"{checkpoint_path}: was not saved by this strategy; resume with the one that saved it")
        checkpoint = agreed(lambda: read_own(self._folder, dist.get_rank(), dist.get_world_size()))
        saved, now = checkpoint.get(WRITER_KEY, {}), self.writer()
        changed = [f"{name} {saved.get(name)} → {now[name]}" for name in now if saved.get(name) != now[name]]
        if changed:
            raise FireflyError(f"{checkpoint_path}: was saved otherwise ({', '.join(changed)}); resume as it was saved")
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: Any = self.lightning_module
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        reader, self._reader = self._reader, None  # it keeps files mapped, which take room also once replaced
        if reader is not None:
            self.load_portable(reader, fitting)
            self._load_whole_tensors(reader)
        else:
            self.load_shards(self._folder, fitting)
        if fitting:
            self.load_scaler_state(checkpoint.get(SCALER_KEY, {}))

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """False: :meth:`load_model_state_dict` restores the optimizer together with the weights."""
        return False

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: :meth:`save_checkpoint` writes the weights."""
        return {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty: :meth:`save_checkpoint` writes the optimizer's state."""
        return {}

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def _without_tensors(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in checkpoint.items() if name not in TENSOR_KEYS}
        if self.optimizers and (scaler := self.scaler_state()):
            kept[SCALER_KEY] = scaler
        return kept

    def _own(self, folder: Path, kept: dict[str, Any]) -> Callable[[], None]:
        """Writes the engine's own form; returns what completes it on the first process."""
        self.save_shards(folder)
        self.barrier()
        files = self._digests(folder)
        trainer = kept | {WRITER_KEY: self.writer() | {DIGESTED_KEY: True}}

        def complete() -> None:
            torch.save(trainer, folder / TRAINER_FILE)
            finish_own(folder, files)

        return complete

    def _portable(self, folder: Path, kept: dict[str, Any]) -> Callable[[], None]:
        """Writes a portable checkpoint; returns what completes it on the first process."""
        writer, trainer = self._collect(PortableWriter(folder, dist.get_rank()), kept)
        files = _merged(from_all(agreed(writer.close)))
        return lambda: finish(folder, files, trainer)

    def _begin(self, io: AtomicCheckpointIO, target: Path, kept: dict[str, Any], folder: ExitStack) -> None:
        """Copies a portable checkpoint aside, and has it written by the threads of all processes."""
        partial, rank = partial_path(target), dist.get_rank()
        others = range(1, dist.get_world_size())
        writer, trainer = self._collect(PortableWriter(partial, rank, io.copies), kept)

        def write() -> None:
            files = writer.close()
            if rank:
                leave_entries(partial, rank, files)
                return
            io.saves.wait_for_others(lambda: all(entries_file(partial, other).exists() for other in others))
            finish(partial, _merged([files, *(take_entries(partial, other) for other in others)]), trainer)

        io.complete(target, write, folder.pop_all())

    def _on_first(self, act: Callable[[], Any]) -> None:
        """Calls ``act`` on the first process only; an error of it ends all processes."""
        agreed(act if self.is_global_zero else _nothing)

    def _collect(self, writer: PortableWriter, kept: dict[str, Any]) -> tuple[PortableWriter, bytes]:
        """Gives a writer this process's share of the tensors; returns it, and the contents of ``trainer.ckpt``."""
        failure: Exception | None = None
        for number, (name, states) in enumerate(self.portable_states()):
            if number % dist.get_world_size() == dist.get_rank() and failure is None:
                try:
                    writer.add(name, states)
                except Exception as error:  # raised below: the others still wait for this process to gather
                    failure = error

        def end() -> None:
            if failure:
                raise failure
            if self.is_global_zero:
                for name, tensor in self.whole_tensors().items():
                    writer.add(name, {WEIGHT: tensor})
            writer.finish_adding()

        agreed(end)
        names = sorted(name for names in from_all(writer.names) for name in names)
        scalars = {"all": self.optimizer_scalars() if self.optimizers else {}, "own": {}}
        return writer, as_file(kept | {TIED_KEY: self._tied(), SCALARS_KEY: scalars, FILES_KEY: names})

    def _digests(self, folder: Path) -> dict[str, FileEntry]:
        """Entries of all files that the processes have written; each process digests a share of them."""
        names: list[str] = self.broadcast(files_of(folder))
        share = names[dist.get_rank() :: dist.get_world_size()]
        return _merged(from_all(agreed(lambda: {name: entry_of(folder / name) for name in share})))

    def _load_whole_tensors(self, reader: PortableReader) -> None:
        saved = set(reader.names())
        with torch.no_grad():
            for name, tensor in self.whole_tensors().items():
                if name in saved:  # a buffer may be newer than the checkpoint
                    tensor.copy_(reader.weight(name))

    def _tied(self) -> dict[str, str]:
        module: Any = self.lightning_module
        first = {id(parameter): name for name, parameter in saved_parameters(module)}
        named = module.named_parameters(remove_duplicate=False)
        names = ((name, first.get(id(parameter), name)) for name, parameter in named)
        return {name: stored for name, stored in names if name != stored}


def _merged(found: Iterable[dict[str, FileEntry]]) -> dict[str, FileEntry]:
    return {name: entry for entries in found for name, entry in entries.items()}


def _kept_buffers(module: Any) -> Iterator[tuple[str, Tensor]]:
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in owner._non_persistent_buffers_set:
                yield name, buffer


def _nothing() -> None:
    pass
