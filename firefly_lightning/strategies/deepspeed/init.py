"""Makes Hugging Face models under ZeRO-3, where parameters are sharded and look empty as soon as they are made."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import Parameter


@contextmanager
def sharded_hugging_face(config: dict[str, Any]) -> Iterator[None]:
    """Makes ``from_pretrained`` and constructors work for models that are made under ``deepspeed.zero.Init``.

    Args:
        config: DeepSpeed's configuration, with stage 3.
    """
    from transformers.integrations import HfDeepSpeedConfig

    # While this object lives, every from_pretrained is collective: rank 0 reads a tensor, each rank keeps its part.
    alive = HfDeepSpeedConfig(config)
    with _initialised_whole():
        yield
    del alive


@contextmanager
def whole_parameters(enabled: bool = True) -> Iterator[None]:
    """Makes whole parameters under ``deepspeed.zero.Init`` too; the engine shards them later, with their values.

    Args:
        enabled: Whether parameters would be sharded as they are made.
    """
    if not enabled:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


@contextmanager
def _initialised_whole() -> Iterator[None]:
    """Gathers the weights of a module while a constructor of transformers draws them at random.

    transformers draws weights once all modules exist, and by then they are sharded. transformers 5 then fills tensors
    without elements, so that the weights which PyTorch's modules drew for themselves stay, embeddings with a deviation
    fifty times too large. In transformers 4 DeepSpeed gathers the weights of a module, but not those of its children,
    which some models draw together with it.
    """
    import deepspeed
    from transformers import PreTrainedModel

    init_weights, initialise = PreTrainedModel.init_weights, PreTrainedModel._initialize_weights
    constructing = False  # from_pretrained gathers for itself what it has to draw

    @functools.wraps(init_weights)
    def init_weights_gathered(self: Any) -> None:
        nonlocal constructing
        before, constructing = constructing, True
        try:
            init_weights(self)
        finally:
            constructing = before

    @functools.wraps(initialise)
    def initialise_gathered(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        drawn = not constructing or getattr(module, "_is_hf_initialized", False)
        sharded = [] if drawn else _sharded_parameters(module)
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
            initialise(self, module, *args, **kwargs)

    PreTrainedModel.init_weights, PreTrainedModel._initialize_weights = init_weights_gathered, initialise_gathered
    try:
        yield
    finally:
        PreTrainedModel.init_weights, PreTrainedModel._initialize_weights = init_weights, initialise


def _sharded_parameters(module: nn.Module) -> list[Parameter]:
    """Parameters of a module and its children, which some models initialise with it, that nobody has gathered yet."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from transformers import PreTrainedModel

    modules = [module, *(child for child in module.children() if not isinstance(child, PreTrainedModel))]
    parameters = (parameter for owner in modules for parameter in owner.parameters(recurse=False))
    status = ZeroParamStatus.NOT_AVAILABLE
    return list(dict.fromkeys(item for item in parameters if getattr(item, "ds_status", None) is status))
