"""Checkpoints of models that PyTorch holds in parts: one file of the whole model, or a folder of all parts."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.layout import BY_NAME, WEIGHT, WRITER_KEY, native_part_file
from firefly_lightning.checkpoints.portable import PortableReader, States
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.checkpoints.unsharded import check_states, numbered_names, saved_parameters, scalars_of
from firefly_lightning.optim.states import is_scalar
from firefly_lightning.strategies.native.dtensors import join, local, part_like, split_of, whole, with_parts
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints


class NativeCheckpoints(ShardedCheckpoints, ModelParallelStrategy):
    """Saves and loads the checkpoints of PyTorch's own parallelism, which have three forms.

    These are a portable folder, which every strategy reads; one file, like that of a run on one device; and a folder
    into which every process writes its parts. Lightning's own folders are not used: they are pickles, which run
    whatever code they hold, and a save that is cut short leaves an incomplete folder.
    """

    _folder: Any = None

    @override
    def writer(self) -> dict[str, Any]:
        mesh = self.device_mesh
        return {"engine": "native", "strategy": type(self).__name__, "mesh": [mesh.size(axis) for axis in (0, 1)]}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._saves_parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint that is a folder, or the file of any strategy that saves one file."""
        if Path(checkpoint_path).is_dir():
            return super().load_checkpoint(checkpoint_path, weights_only)
        self._folder = None
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return self._folder is None  # a folder's optimizer is loaded with its weights

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._saves_parts:
            return {}
        state = _each_once(self._state(), self._gather)
        return state if self.is_global_zero else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._saves_parts:
            return {}
        state = _with_state(optimizer.state_dict(), lambda _, value: self._gather(value))
        return state if self.is_global_zero else {}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._folder is not None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            self._load_weights(checkpoint["state_dict"], part_like, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if BY_NAME in saved:
                names = enumerate(numbered_names(self.lightning_module, optimizer))  # type: ignore[arg-type]
                states = {number: saved[BY_NAME][name] for number, name in names if name in saved[BY_NAME]}
                saved = optimizer.state_dict() | {"state": states}
            _load_optimizer(optimizer, saved, part_like)

    @override
    def portable_states(self) -> Iterator[tuple[str, States]]:
        for name, parameter in self._named_parts():
            tensors = {key: value for key, value in self._optimizer_state(parameter).items() if not is_scalar(value)}
            yield name, {key: self._copy(value) for key, value in {WEIGHT: parameter, **tensors}.items()}

    @override
    def optimizer_scalars(self) -> dict[str, Any]:
        state: dict[str, Any] = next(
            (state for optimizer in self.optimizers for state in optimizer.state.values() if state), {}
        )
        return {
            key: self._copy(value) for key, value in state.items() if isinstance(value, Tensor) and is_scalar(value)
        }

    @override
    def load_portable(self, reader: PortableReader, fitting: bool) -> None:
        parts = self._named_parts()
        names = {id(parameter): name for name, parameter in parts}
        with torch.no_grad():
            for name, parameter in parts:
                local(parameter).copy_(part_like(reader.weight(name), parameter))
        trainer = reader.trainer() if fitting else {}
        for optimizer in self.optimizers if fitting else []:
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            check_states(optimizer, reader.states_like_weights())
            for parameter in own:
                name = names[id(parameter)]
                state = {key: _like(reader.state(key, name), parameter, part_like) for key in reader.keys(name)}
                optimizer.state[parameter] = scalars_of(trainer, name) | state if state else {}

    @override
    def save_shards(self, folder: Path) -> None:
        state = self._state()
        parts = {
            "weights": _each_once(state, _own_part),
            "splits": {name: split_of(value) for name, value in state.items() if isinstance(value, Tensor)},
            "optimizers": [
                _with_state(optimizer.state_dict(), lambda _, value: _own_part(value)) for optimizer in self.optimizers
            ],
        }
        AtomicCheckpointIO().save_checkpoint(parts, folder / native_part_file(self.global_rank))

    @override
    def load_shards(self, folder: Path, fitting: bool) -> None:
        saved = load_file(folder / native_part_file(self.global_rank), "cpu")
        module: Any = self.lightning_module
        self._load_weights(saved["weights"], _as_it_is, module.strict_loading)
        if fitting:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                _load_optimizer(optimizer, state, _as_it_is)

    @property
    def _saves_parts(self) -> bool:
        """Whether checkpoints are folders that all processes fill."""
        return self.saves_portable or self._save_distributed_checkpoint

    def _named_parts(self) -> list[tuple[str, Parameter]]:
        """The parameters that the optimizer steps on, with their names.

        FSDP2 leaves whole parameters in the place of these after a forward pass without a backward pass, as in
        validation; they are split again first.
        """
        module: Any = self.lightning_module
        for owner in module.modules():
            if hasattr(owner, "reshard"):
                owner.reshard()
        parts = list(saved_parameters(module))
        known = {id(parameter) for _, parameter in parts}
        assert all(id(parameter) in known for optimizer in self.optimizers for parameter in optimizer.state)
        return parts

    def _optimizer_state(self, parameter: Parameter) -> dict[str, Any]:
        return next((dict(one.state[parameter]) for one in self.optimizers if parameter in one.state), {})

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy of the whole tensor in host memory; all processes call this together."""
        return whole(tensor.detach()).to("cpu", copy=True)

    def _state(self) -> dict[str, Any]:
        """The parameters and buffers themselves, not copies, by name; a tied weight is there under both its names."""
        module: Any = self.lightning_module
        state: dict[str, Any] = module.state_dict(keep_vars=True)
        if not module.strict_loading:
            kept = {name for name, _ in saved_parameters(module)}
            state = {name: value for name, value in state.items() if name in kept}
        return state

    def _gather(self, value: Any) -> Any:
        """The whole tensor in host memory of the first process, None on others; what is no tensor stays as it is."""
        if not isinstance(value, Tensor):
            return value
        gathered = whole(value.detach())
        # A copy: a tensor that does not divide evenly comes back as a view of a larger one.
        return gathered.to("cpu", copy=True) if self.is_global_zero else None

    def _load_weights(self, saved: Mapping[str, Any], part: "Part", strict: bool) -> None:
        module: Any = self.lightning_module
        own = self._state()
        parts = {name: _like(value, own.get(name), part) for name, value in saved.items()}
        module.load_state_dict(parts, strict=strict)


Part = Callable[[Tensor, Tensor], Tensor]
"""Takes this process's part of a saved tensor: given the saved tensor and the parameter that it is loaded into."""


def read_weights(folder: Path, trainer: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole weights in a folder that :meth:`NativeCheckpoints.save_shards` filled, by their names in the module.

    Args:
        folder: The checkpoint.
        trainer: Contents of the checkpoint's ``trainer.ckpt``.

    Raises:
        FireflyError: If a part is missing or damaged.
    """
    mesh = trainer[WRITER_KEY]["mesh"]
    ranks = [load_file(folder / native_part_file(rank), "cpu") for rank in range(prod(mesh))]
    splits = ranks[0]["splits"]
    return {name: join([rank["weights"][name] for rank in ranks], split, mesh) for name, split in splits.items()}


def _as_it_is(saved: Tensor, like: Tensor) -> Tensor:
    return saved


def _own_part(value: Any) -> Any:
    return local(value.detach()).cpu() if isinstance(value, Tensor) else value


def _like(saved: Any, like: Any, part: Part) -> Any:
    """Turns a saved tensor into one that is split as ``like`` is; what does not fit ``like`` is returned as it is."""
    if not isinstance(saved, Tensor) or not isinstance(like, Tensor):
        return saved
    own = part(saved, like) if saved.dim() == like.dim() else saved
    if own.shape != local(like).shape:
        return saved
    return with_parts(own.clone(), like)  # a view would keep the whole tensor of the checkpoint's file alive


def _each_once(state: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[str, Any]:
    """Calls ``read`` on every value of a state, only once for a tensor with two names, so that it is stored once."""
    values = {key: read(value) for key, value in {id(value): value for value in state.values()}.items()}
    return {name: values[id(value)] for name, value in state.items()}


def _with_state(state_dict: dict[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with every value replaced by ``change(number of the parameter, value)``."""
    states = state_dict["state"].items()
    changed = {number: {name: change(number, value) for name, value in own.items()} for number, own in states}
    return state_dict | {"state": changed}


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any], part: Part) -> None:
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, own, strict=False))  # `load_state_dict` says what does not fit
    optimizer.load_state_dict(_with_state(saved, lambda number, value: _like(value, parameters.get(number), part)))
