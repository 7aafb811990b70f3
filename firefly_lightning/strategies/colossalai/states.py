"""Reads and sets models that ColossalAI trains, one whole parameter after another, as portable checkpoints hold them.

ColossalAI's own functions gather and split the tensors. Importing this module imports ColossalAI.
"""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from colossalai.checkpoint_io.hybrid_parallel_checkpoint_io import HybridParallelCheckpointIO
from colossalai.checkpoint_io.utils import gather_distributed_param
from colossalai.tensor.d_tensor import (
    distribute_tensor,
    get_device_mesh,
    get_global_shape,
    get_sharding_spec,
    is_distributed_tensor,
)
from torch import Tensor
from torch.nn import Parameter
from transformers import BloomForCausalLM

from firefly_lightning.checkpoints.layout import MODEL_PREFIX, WEIGHT
from firefly_lightning.checkpoints.portable import PortableReader, States
from firefly_lightning.checkpoints.unsharded import check_states, scalars_of
from firefly_lightning.strategies.colossalai import padded_vocabulary
from firefly_lightning.strategies.colossalai.fixes import gemini_masters, hybrid_masters

STEP = "step"


def steps_done(optimizer: Any) -> int:
    """Steps that a boosted optimizer has done; 0 before its first step, and where there is no optimizer."""
    states = optimizer.optim.state.values() if optimizer else ()
    return int(max((float(state.get(STEP, 0)) for state in states), default=0))


def read_gemini(wrapper: Any, optimizer: Any) -> Iterator[tuple[str, States]]:
    """Yields each parameter's name, with its weight, the float32 master if there is one, and its optimizer states.

    Args:
        wrapper: The boosted model.
        optimizer: The boosted optimizer; None where there is none.
    """
    numbers = {id(parameter): number for number, parameter in optimizer.id_to_real_params.items()} if optimizer else {}
    with gemini_masters(wrapper):
        held = wrapper.fp32_params if wrapper.chunk_manager.reuse_fp16_chunk else wrapper.fp16_params
        parameters = {id(tensor): parameter for tensor, parameter in zip(held, wrapper.fp16_params, strict=True)}
        for chunk in wrapper.chunk_manager.get_chunks(held):
            for tensor, weight in wrapper._get_chunk_to_save_data(chunk, only_rank_0=False).items():
                parameter = parameters[id(tensor)]
                number = numbers.get(id(parameter))
                states = {} if number is None else optimizer.collect_states(number, only_rank_0=False)
                kept = {key: state for key, state in states.items() if key != STEP}
                # A clone: the weight is a view of its chunk, and a bias not yet written would keep the chunk alive.
                yield MODEL_PREFIX + wrapper.param2name[parameter], {WEIGHT: weight.clone(), **kept}


def write_gemini(wrapper: Any, optimizer: Any, reader: PortableReader) -> None:
    """Sets weights and optimizer states, which :func:`read_gemini` gives, to those of a checkpoint."""
    with gemini_masters(wrapper):
        # Not strict: the tied head is a name without a weight of its own.
        wrapper.load_state_dict(_Weights(reader), strict=False)
    if not optimizer:
        return
    check_states(optimizer.optim, reader.states_like_weights())
    trainer = reader.trainer()
    for number in optimizer.id_to_fake_params:
        name = MODEL_PREFIX + wrapper.param2name[optimizer.id_to_real_params[number]]
        if keys := reader.keys(name):
            states = {key: reader.state(key, name) for key in keys}
            optimizer.load_single_param_states(number, {STEP: scalars_of(trainer, name)[STEP], **states})


class _Weights(Mapping[str, Tensor]):
    """Stands for a ``state_dict``: the weights of a Bloom by name, each read when Gemini asks for it."""

    def __init__(self, reader: PortableReader) -> None:
        self._reader = reader
        self._names = {name.removeprefix(MODEL_PREFIX) for name in reader.names() if name.startswith(MODEL_PREFIX)}

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.weight(MODEL_PREFIX + name)

    def __contains__(self, name: object) -> bool:  # without reading the weight
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def copy(self) -> "_Weights":
        """Returns itself, since nothing in it can be changed."""
        return self


def read_hybrid(bloom: BloomForCausalLM, optimizer: Any, plugin: Any) -> Iterator[tuple[str, States]]:
    """Yields each parameter as :func:`read_gemini` does, without rows that only pad the vocabulary.

    Args:
        bloom: The boosted model.
        optimizer: The boosted optimizer; None where there is none.
        plugin: The plugin that boosted them.
    """
    for name, parameter in bloom.named_parameters():
        with hybrid_masters([parameter], optimizer, plugin.dp_group):
            weight = gather_distributed_param(parameter).clone()
        states = HybridParallelCheckpointIO.gather_from_sharded_optimizer_state(
            {key: state for key, state in _state(optimizer, parameter).items() if key != STEP},
            parameter,
            original_shape=_whole_shape(parameter),
            dp_group=plugin.dp_group,
            tp_group=plugin.tp_group,
            use_zero=plugin.zero_stage > 0,
            inplace=False,
        )
        full, vocab_size = MODEL_PREFIX + name, bloom.config.vocab_size
        whole = {WEIGHT: weight, **states}
        yield full, {key: padded_vocabulary.strip(full, tensor, vocab_size) for key, tensor in whole.items()}


def write_hybrid(
    bloom: BloomForCausalLM, optimizer: Any, plugin: Any, files: HybridParallelCheckpointIO, reader: PortableReader
) -> None:
    """Sets weights and optimizer states, which :func:`read_hybrid` gives, to those of a checkpoint.

    Args:
        bloom: The boosted model.
        optimizer: The boosted optimizer; None where there is none.
        plugin: The plugin that boosted them.
        files: The plugin's object for checkpoints, which knows how states are split.
        reader: Reads the checkpoint.
    """
    trainer = reader.trainer() if optimizer else {}
    if optimizer:
        check_states(optimizer.optim, reader.states_like_weights())
    for name, parameter in bloom.named_parameters():
        full, shape = MODEL_PREFIX + name, _whole_shape(parameter)
        with torch.no_grad(), hybrid_masters([parameter], optimizer, plugin.dp_group):
            parameter.data.copy_(_part(padded_vocabulary.fill_up(reader.weight(full), shape), parameter))
            if optimizer:
                optimizer.update_master_params(SimpleNamespace(parameters=lambda one=parameter: [one]))
        if optimizer and (keys := reader.keys(full)):
            master = _master(optimizer, parameter)
            states = {key: padded_vocabulary.fill_up(reader.state(key, full), shape) for key in keys}
            optimizer.optim.state[master] = scalars_of(trainer, full) | files.shard_from_complete_optimizer_state(
                states,
                current_shape=parameter.shape,
                original_shape=shape,
                device=master.device,
                dtype=master.dtype,
                inplace=True,
            )


def _master(optimizer: Any, parameter: Parameter) -> Tensor:
    """The tensor that the optimizer steps on: the parameter's master, or the parameter itself where it has none."""
    masters: dict[int, Tensor] = optimizer.get_working_to_master_map() or {}
    return masters.get(id(parameter), parameter)


def _state(optimizer: Any, parameter: Parameter) -> dict[str, Any]:
    return dict(optimizer.optim.state.get(_master(optimizer, parameter), {})) if optimizer else {}


def _whole_shape(parameter: Parameter) -> torch.Size:
    """Shape of a parameter before it was split, rows that pad the vocabulary included."""
    return torch.Size(get_global_shape(parameter)) if is_distributed_tensor(parameter) else parameter.shape


def _part(whole: Tensor, parameter: Parameter) -> Tensor:
    """This process's part of a whole weight, split as ``parameter`` is."""
    whole = whole.to(parameter.device)
    if not is_distributed_tensor(parameter):
        return whole
    part: Tensor = distribute_tensor(whole, get_device_mesh(parameter), get_sharding_spec(parameter))
    return part
