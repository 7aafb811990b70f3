"""A rehearsal of an optimizer on a small Bloom, before weights are loaded: whether it trains, and can be resumed."""

import io
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.optim.released import ReleasedGradients
from firefly_lightning.optim.states import FORMS, is_scalar, kept_for, put_together, taken_apart, uncompiled

Make = Callable[[nn.Module], Optimizer]
"""Makes an optimizer of a module's parameters."""

T = TypeVar("T")

_ANOTHER = "take another, such as torch.optim.AdamW"


def small_bloom() -> BloomForCausalLM:
    """A Bloom of one layer; its matrices are large enough for states of eight bits, which small ones do not get."""
    with torch.random.fork_rng(devices=[]):
        return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=2))


def rehearse(make: Make, schedule: Callable[[Optimizer], Any], device: torch.device, released: bool = False) -> None:
    """Refuses an optimizer that cannot train a Bloom, or whose states no checkpoint can hold.

    Args:
        make: Makes the optimizer.
        schedule: Makes its schedule.
        device: Device of the run.
        released: Whether each weight is to be updated as its gradient arrives.

    Raises:
        FireflyError: If it cannot be made or cannot step, has no learning rate, or would go on otherwise after a save.
    """
    model = small_bloom().to(device)
    with torch.random.fork_rng(), uncompiled():
        optimizer = attempt(lambda: make(model))
        name = type(optimizer).__name__
        attempt(lambda: _train(model, optimizer, schedule), f"model.optimizer: {name} cannot train this model")
        _check_resumes(make, model, optimizer, name)
        if released:
            _check_released(make, model, name)


def attempt(act: Callable[[], T], what: str = "model.optimizer: cannot be made of the model's weights") -> T:
    """What ``act`` returns.

    Args:
        act: Calls what may be anybody's code.
        what: What is wrong where it fails; opens the message.

    Raises:
        FireflyError: If it fails, with whatever exception.
    """
    try:
        return act()
    except Exception as error:
        if "Muon only supports 2D" in str(error):
            muon = (
                "Muon is for matrices alone; take firefly_lightning.optim.MuonWithAdamW, which has AdamW for all else"
            )
            raise FireflyError(f"model.optimizer: {muon}") from error
        if isinstance(error, FireflyError):
            raise
        raise FireflyError(f"{what} ({reason(error)}); {_ANOTHER}") from error


def check_elementwise(make: Callable[[Any], Optimizer]) -> None:
    """Refuses an optimizer that computes something else where a strategy holds parts of weights.

    Args:
        make: Makes the optimizer of parameters.

    Raises:
        FireflyError: If parts of a weight are not updated as the whole is, or states are not shaped like the weight.
    """
    generator = torch.Generator().manual_seed(0)
    wholes = [Parameter(torch.randn(*shape, generator=generator)) for shape in ((96, 64), (65,))]
    parts = [list(map(Parameter, _cut(whole.detach().clone()))) for whole in wholes]
    with torch.random.fork_rng(), uncompiled():
        optimizer, alike = make(wholes), True
        try:
            of_parts = make([part for own in parts for part in own])
            for _ in range(3):
                for whole, own in zip(wholes, parts, strict=True):
                    whole.grad = torch.randn(whole.shape, generator=generator)
                    for part, gradient in zip(own, _cut(whole.grad.clone()), strict=True):
                        part.grad = gradient
                optimizer.step()
                of_parts.step()
        except Exception:  # of any type, as an optimizer of matrices raises for what is none
            alike = False
    for whole, own in zip(wholes, parts, strict=True):
        joined = torch.cat([part.detach() for part in own]).view(whole.shape)
        entries = taken_apart(optimizer.state[whole])
        shaped = all(is_scalar(value) or value.shape == whole.shape for value in entries.values())
        alike &= FORMS not in entries and shaped and torch.allclose(whole.detach(), joined, 1e-5, 1e-7)
    if not alike:
        raise FireflyError(
            f"model.optimizer: this strategy updates parts of weights, which {type(optimizer).__name__} cannot do as "
            "it does whole ones; take trainer.strategy auto or ddp, or an optimizer such as torch.optim.AdamW"
        )


def _cut(whole: Tensor) -> tuple[Tensor, ...]:
    """Two parts of a tensor, neither of which is a whole number of rows or of blocks of states."""
    return whole.flatten().tensor_split([whole.numel() // 2 + 1])


def through_a_file(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries of a state as they are after a checkpoint has held them."""
    tensors = {key: value.detach().cpu().clone() for key, value in entries.items() if not is_scalar(value)}
    buffer = io.BytesIO()
    torch.save({key: value for key, value in entries.items() if is_scalar(value)}, buffer)
    buffer.seek(0)
    rest: dict[str, Any] = torch.load(buffer, weights_only=True)
    loaded: dict[str, Tensor] = load_tensors(save_tensors(tensors))
    return loaded | rest


def _check_resumes(make: Make, model: nn.Module, optimizer: Optimizer, name: str) -> None:
    """Whether a second optimizer that gets the states of the first goes on as the first does."""
    other = deepcopy(model)
    resumed = make(other)
    try:
        _copy_states(optimizer, resumed)
        _copy_settings(optimizer, resumed)
        _step(model, optimizer, 2)
        _step(other, resumed, 2)
        same = _same(model, other)
    except Exception as error:
        raise FireflyError(f"model.optimizer: no checkpoint can hold {name} ({reason(error)}); {_ANOTHER}") from error
    if not same:
        raise FireflyError(
            f"model.optimizer: {name} goes on otherwise from a checkpoint, since it keeps more than states of weights; "
            f"{_ANOTHER}"
        )


def _check_released(make: Make, model: nn.Module, name: str) -> None:
    """Whether weights that are updated one by one become those that are updated together."""
    other = deepcopy(model)
    together, alone = make(model), make(other)
    released = ReleasedGradients(alone)
    for number in range(3):
        _step(model, together, number)
        for parameter, gradient in zip(other.parameters(), _gradients(other, number), strict=True):
            # An expression whose gradient is the given one, so that it arrives as in a backward pass.
            torch.autograd.backward((parameter * gradient).sum())
        alone.step()
    released.stop()
    if not _same(model, other):
        raise FireflyError(
            f"model.release_gradients: {name} does not update each weight by itself; leave it out, or {_ANOTHER}"
        )


def _gradients(model: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator).to(each.device) for each in model.parameters()]


def _train(model: nn.Module, optimizer: Optimizer, schedule: Callable[[Optimizer], Any]) -> None:
    for number in range(2):
        _step(model, optimizer, number)
    try:
        schedule(optimizer)
    except (KeyError, TypeError):  # says that there is no learning rate, but not in words
        _check_rates(optimizer)
        raise
    _check_rates(optimizer)


def _check_rates(optimizer: Optimizer) -> None:
    if any(not _is_number(group.get("lr")) for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise FireflyError(f"model.optimizer: {name} has no learning rate (lr) to set; give it one, or {_ANOTHER}")


def _step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter, gradient in zip(model.parameters(), _gradients(model, seed), strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _copy_states(optimizer: Optimizer, other: Optimizer) -> None:
    for group, new in zip(optimizer.param_groups, other.param_groups, strict=True):
        for parameter, like in zip(group["params"], new["params"], strict=True):
            entries = through_a_file(taken_apart(optimizer.state.get(parameter, {})))
            kept = kept_for(other, new, like)
            if kept is None:
                raise FireflyError("its step needs more than gradients")
            if entries:
                other.state[like] = put_together(entries, kept, like)


def _copy_settings(optimizer: Optimizer, other: Optimizer) -> None:
    for group, new in zip(optimizer.param_groups, other.param_groups, strict=True):
        new.update({key: deepcopy(value) for key, value in group.items() if key != "params"})


def _same(model: nn.Module, other: nn.Module) -> bool:
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(model.parameters(), other.parameters(), strict=True))
    return all(torch.equal(one, two) for one, two in pairs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
