"""Subclasses that mend or add what ColossalAI 0.5.0 does wrong or not at all. Importing this imports ColossalAI."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin
from colossalai.booster.plugin.gemini_plugin import get_param_info
from colossalai.zero import GeminiDDP, GeminiOptimizer
from colossalai.zero.gemini.placement_policy import PlacementPolicyFactory, StaticPlacementPolicy
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override


class Float32Gemini(GeminiDDP):  # type: ignore[misc]
    """Gemini in float32, in which it can compute although it and its optimizer insist on being told a 16-bit type."""

    claims_bfloat16 = False

    @property
    def mixed_precision(self) -> torch.dtype:
        """The type that weights and inputs are cast to."""
        return torch.bfloat16 if self.claims_bfloat16 else torch.float32

    @mixed_precision.setter
    def mixed_precision(self, dtype: torch.dtype) -> None:
        """Ignores the type, which ``GeminiDDP.__init__`` sets to one that its assertion allows."""


class ClippingGeminiOptimizer(GeminiOptimizer):  # type: ignore[misc]
    """Gemini's optimizer that clips bfloat16 gradients on the host too, and keeps the norm before clipping.

    ``HybridAdam`` divides gradients by ``div_scale``, but takes bfloat16 gradients on a CPU as they are.
    """

    gradient_norm = float("nan")

    def _get_combined_scale(self) -> float:
        scale = float(super()._get_combined_scale())
        self.gradient_norm = self._current_grad_norm / loss_scale(self)
        if scale != -1:
            for grad in (parameter.grad for group in self.param_groups for parameter in group["params"]):
                if grad is not None and grad.dtype is torch.bfloat16 and grad.device.type == "cpu":
                    grad.div_(scale)
        return scale


class FractionsOfChunks(StaticPlacementPolicy):  # type: ignore[misc]
    """Gemini's ``static`` placement, counting each chunk once; its own class counts it once for each of its weights."""

    @override
    def setup_grads_device(self, params: list[Tensor], grads_device_map: dict[Tensor, torch.device]) -> None:
        one_of_each = {self.chunk_manager.get_chunk(parameter): parameter for parameter in params}
        super().setup_grads_device(list(one_of_each.values()), grads_device_map)


PlacementPolicyFactory.policies["static"] = FractionsOfChunks


class FixedGeminiPlugin(GeminiPlugin):  # type: ignore[misc]
    """ColossalAI's plugin for Gemini with the mended classes of this module.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        options: Options of ``GeminiPlugin``.
    """

    def __init__(self, precision: str, **options: Any) -> None:
        self.wrapper = Float32Gemini if precision == "fp32" else GeminiDDP
        super().__init__(precision="bf16" if precision == "fp32" else precision, **options)

    def configure(self, model: Any, optimizer: Optimizer | None = None, *rest: Any, **named: Any) -> tuple[Any, ...]:
        """Wraps the model and the optimizer; returns None for criterion, loader and schedule, which are not boosted."""
        info = get_param_info(optimizer)
        wrapper = self.wrapper(
            model, **self.gemini_config, zero_group=self.zero_group, extra_dp_group=self.extra_dp_group
        )
        if optimizer is None:
            return wrapper, None, None, None, None
        wrapper.claims_bfloat16 = True
        boosted = ClippingGeminiOptimizer(
            optimizer, wrapper, **self.zero_optim_config, **self.optim_kwargs, params_info=info
        )
        wrapper.claims_bfloat16 = False
        return wrapper, boosted, None, None, None


class FixedHybridPlugin(HybridParallelPlugin):  # type: ignore[misc]
    """ColossalAI's plugin for tensor parallelism, which also does ZeRO in float32.

    Its optimizer can do that; only an assertion that compares the precision with ``fp32`` forbids it.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        options: Options of ``HybridParallelPlugin``.
    """

    def __init__(self, precision: str, **options: Any) -> None:
        super().__init__(precision=precision, **options)
        if precision == "fp32":
            self.precision = "float32"  # no 16-bit type, and not the name that the assertion forbids: nothing is cast


def loss_scale(optimizer: Any) -> float:
    """The factor that the loss is multiplied with before the backward pass; 1 except in float16."""
    return float(getattr(_mixin(optimizer), "loss_scale", 1.0))


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """What the scaler of the loss has learned, by the keys of ``GradScaler``; empty where no loss is scaled.

    The ``state_dict`` of ColossalAI's scaler leaves out its counters.
    """
    scaler = getattr(_mixin(optimizer), "grad_scaler", None)
    if scaler is None:
        return {}
    return {
        "scale": float(scaler._scale),
        "growth_factor": scaler._growth_factor,
        "backoff_factor": scaler._backoff_factor,
        "growth_interval": scaler._growth_interval,
        "_growth_tracker": scaler._growth_step,
        "tolerated": scaler._hysteresis - scaler._hysteresis_step - 1,  # overflows before the scale shrinks
    }


def load_scaler_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Sets the scale and the counters that the scaler of any strategy has learned."""
    scaler = getattr(_mixin(optimizer), "grad_scaler", None)
    if scaler is not None and state:
        scaler._scale.fill_(state["scale"])
        scaler._growth_step = state["_growth_tracker"]
        scaler._hysteresis_step = scaler._hysteresis - 1 - state.get("tolerated", 0)


@contextmanager
def gemini_masters(wrapper: Any) -> Iterator[None]:
    """Has Gemini save and load float32 masters as they are.

    By itself it rounds masters to the 16-bit type and, where gradients accumulate, takes the 16-bit weights instead.
    """
    manager = wrapper.chunk_manager
    reused, dtype = manager.reuse_fp16_chunk, wrapper.mixed_precision
    manager.reuse_fp16_chunk, wrapper.mixed_precision = wrapper.master_weights, torch.float32
    try:
        yield
    finally:
        manager.reuse_fp16_chunk, wrapper.mixed_precision = reused, dtype


@contextmanager
def hybrid_masters(parameters: Iterable[Parameter], optimizer: Any, group: dist.ProcessGroup) -> Iterator[None]:
    """Puts float32 masters in the place of 16-bit weights, since the plugin saves and loads only the latter.

    Args:
        parameters: Parameters of the model.
        optimizer: The boosted optimizer; None where there is none.
        group: The data-parallel processes, over which ZeRO spreads the masters.
    """
    masters = (optimizer and optimizer.get_working_to_master_map()) or {}
    weights = [(parameter, parameter.data) for parameter in parameters if id(parameter) in masters]
    for parameter, _ in weights:
        parameter.data = _whole(masters[id(parameter)], parameter, group)
    try:
        yield
    finally:
        for parameter, data in weights:
            data.copy_(parameter.data)
            parameter.data = data


def _whole(master: Tensor, parameter: Parameter, group: dist.ProcessGroup) -> Tensor:
    if master.shape == parameter.shape:
        return master.data
    gathered = master.new_empty(master.numel() * dist.get_world_size(group), device=parameter.device)
    dist.all_gather_into_tensor(gathered, master.to(parameter.device), group=group)
    return gathered[: parameter.numel()].view_as(parameter)


def _mixin(optimizer: Any) -> Any:
    """The object that handles precision, for which ColossalAI's optimizers have three names; None if there is none."""
    names = ("mix_precision_mixin", "mixed_precision_mixin", "mixed_precision")
    return next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), None)
