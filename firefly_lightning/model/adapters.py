"""Adapters: small weights that are trained while a model's own stay as they are, by peft.

peft has the methods; here is what a user writes, what cannot work with a Bloom, and how a checkpoint tells of it. peft
is imported only where a run asks for an adapter.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError, check_number, reason, require, some
from firefly_lightning.huggingface.folder import quiet_peft
from firefly_lightning.model.adapter_errors import shown, what_is_wrong

LINEAR_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The four linear layers of a Bloom's block, by their last names."""

NAME = "default"
"""Name under which peft keeps the one adapter of a model."""

_NEED_CALLS = {
    "ADALORA": "must be told of every step, which no Trainer does",
    "POLY": "must be told the task of each row, which no row says",
}
"""Methods of peft that need more than a batch, and what."""

_INITIAL = (True, False, "gaussian", "orthogonal")
"""Initial weights of LoRA that leave the weights of the model as they are."""

_MAY_CHANGE = ("peft_version", "base_model_name_or_path", "inference_mode", "task_type", "revision", "lora_dropout")
"""Fields of an adapter's configuration that may be others in a resumed run."""


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al., 2021): the product of two narrow matrices is added to each of some linear layers.

    Args:
        rank: Columns of the first matrix and rows of the second.
        alpha: What the product is scaled by, divided by the rank.
        dropout: Probability with which an input of the two matrices is dropped.
        target_modules: Last names of the layers; the four linear layers of every block by default.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: [*LINEAR_LAYERS])


def as_config(adapter: Any) -> Any:
    """The configuration of peft for what a user has written; None for None.

    Args:
        adapter: ``lora``, a :class:`Lora`, an instance of one of peft's configurations, or None.

    Raises:
        FireflyError: If peft is missing, or it is something else.
    """
    if adapter is None:
        return None
    require("adapters", "peft")
    quiet_peft()
    import peft

    if adapter == "lora":
        adapter = Lora()
    if isinstance(adapter, Lora):
        check_number("model.adapter.rank", adapter.rank, least=1)
        check_number("model.adapter.alpha", adapter.alpha, above=0)
        check_number("model.adapter.dropout", adapter.dropout, least=0, most=0.999)
        names = list(adapter.target_modules)
        return peft.LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=names
        )
    if isinstance(adapter, peft.PeftConfig):
        return deepcopy(adapter)
    raise FireflyError(what_is_wrong(adapter))


def check_adapter(config: Any, bloom_config: BloomConfig) -> None:
    """Refuses an adapter that a Bloom cannot have, by putting it into one without weights.

    Args:
        config: The configuration of peft.
        bloom_config: Configuration of the model that it is for.

    Raises:
        FireflyError: If peft or this project cannot train it, or it names layers that the model lacks.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in _NEED_CALLS:
        raise FireflyError(f"model.adapter: {kind} {_NEED_CALLS[kind]}; take peft.LoraConfig")
    if getattr(config, "init_lora_weights", True) not in _INITIAL:
        raise FireflyError(
            f"model.adapter: init_lora_weights {config.init_lora_weights} changes the model's own weights, which no "
            "checkpoint holds; leave it out"
        )
    if getattr(config, "layer_replication", None):
        raise FireflyError("model.adapter: layer_replication makes another model; leave it out")
    with torch.device("meta"):
        bloom = BloomForCausalLM(bloom_config)
    lacking = [
        name for name in _listed(config) if not any(_is_named(module, name) for module, _ in bloom.named_modules())
    ]
    if lacking:
        linear = sorted(
            {name.rpartition(".")[2] for name, part in bloom.named_modules() if isinstance(part, nn.Linear)}
        )
        raise FireflyError(
            f"model.adapter: the model has no {some(lacking)}; its linear layers are {', '.join(linear)}"
        )
    put(bloom, config)
    trained = [name for name, parameter in bloom.named_parameters() if parameter.requires_grad]
    if not trained:
        raise FireflyError("model.adapter: trains nothing; name its target_modules")
    if getattr(config, "modules_to_save", None) and not any(".modules_to_save." in name for name in trained):
        raise FireflyError("model.adapter: this release of peft passes over modules_to_save; take peft 0.14 or later")
    ends = [name for name in trained if name.startswith(("transformer.word_embeddings.", "lm_head."))]
    if ends and bloom_config.tie_word_embeddings:
        raise FireflyError(
            f"model.adapter: trains {ends[0]}, but embedding and head are one weight in this model, which would come "
            "apart; leave both out, or train all weights"
        )


def put(bloom: BloomForCausalLM, config: Any, seed: int = 0) -> None:
    """Puts an adapter into a model, whose own weights are frozen with it.

    Args:
        bloom: The model; its weights may be on ``meta``, quantised or in parts.
        config: The configuration of peft, which stays as it is.
        seed: Seed of the adapter's random weights, so that every process draws the same under every strategy.

    Raises:
        FireflyError: If peft refuses the adapter.
    """
    from peft import inject_adapter_in_model

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that peft has not seen before, and of tied weights
            torch.manual_seed(seed)
            inject_adapter_in_model(deepcopy(config), bloom)
    except Exception as error:  # of many types, by the method
        raise FireflyError(f"model.adapter: peft cannot put it into a Bloom ({reason(error)})") from error


@contextmanager
def without_adapter(bloom: BloomForCausalLM) -> Iterator[None]:
    """Has a model compute what its base does, while the context lasts; nothing that trains changes.

    peft's own way would also freeze the adapter's weights and free them again, which engines watch.
    """
    switched = [module for module in bloom.modules() if getattr(module, "_disable_adapters", None) is False]
    for module in switched:
        vars(module)["_disable_adapters"] = True
    try:
        yield
    finally:
        for module in switched:
            vars(module)["_disable_adapters"] = False


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of an adapter as peft writes them into ``adapter_config.json``: plain values by name."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        fields: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    return {name: _in_order(value) for name, value in fields.items()}


def config_of(fields: Mapping[str, Any]) -> Any:
    """The configuration of peft from what :func:`fields_of` gave.

    Raises:
        FireflyError: If peft does not know such an adapter; a later release may have written it.
    """
    require("adapters", "peft")
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**fields)
    except Exception as error:  # anybody may have written the fields
        raise FireflyError(f"the adapter's configuration cannot be used ({reason(error)}); is peft too old?") from error


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that the adapter of a checkpoint is that of the run that resumes from it.

    Args:
        saved: Fields of the adapter in the checkpoint.
        now: Fields of the run's own.

    Raises:
        FireflyError: If a field differs that decides what is computed.
    """
    both = sorted(saved.keys() & now.keys() - {*_MAY_CHANGE})
    names = [name for name in both if _in_order(saved[name]) != _in_order(now[name])]
    if names:
        changed = [f"{name} {shown(saved[name])} → {shown(now[name])}" for name in names]
        raise FireflyError(f"model.adapter: differs from the checkpoint's ({some(changed)}); resume with that one")


def compute_in(bloom: BloomForCausalLM, config: Any, dtype: torch.dtype) -> None:
    """Keeps frozen linear layers in the type in which autocast computes them: half the memory, the same results.

    Args:
        bloom: A model with its adapter.
        config: The adapter's configuration; only of a plain LoRA are the results known to be the same.
        dtype: The type in which products are computed.
    """
    if getattr(config.peft_type, "value", None) != "LORA" or config.use_dora:
        return
    for layer in _frozen_linear(bloom):
        layer.to(dtype)
    for module in bloom.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # autocast casts what needs to be cast


def _frozen_linear(bloom: BloomForCausalLM) -> Iterator[nn.Module]:
    for module in bloom.transformer.h.modules():
        if type(module) is nn.Linear and not any(parameter.requires_grad for parameter in module.parameters()):
            yield module


def _listed(config: Any) -> list[str]:
    """Names of layers that a configuration lists; a regular expression and ``all-linear`` list none."""
    named = [getattr(config, field, None) or () for field in ("target_modules", "modules_to_save")]
    return [name for names in named if not isinstance(names, str) for name in sorted(names)]


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _in_order(value: Any) -> Any:
    """The names in a list sorted: peft keeps them in a set, whose order is another in each process."""
    return sorted(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value
