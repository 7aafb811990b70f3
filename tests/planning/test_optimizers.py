"""What optimizers keep: real states of real weights are as a few small trials foretell."""

from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from lion_pytorch import Lion
from torch.nn import Parameter

from firefly_lightning.errors import FireflyError
from firefly_lightning.planning.optimizers import adamw, cost_of
from firefly_lightning.planning.ways import ADAFACTOR, ADAMW_8BIT

SHAPES = [(768, 2048), (3000, 256), (2048,)]
OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "Adafactor": torch.optim.Adafactor,
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "Lion": Lion,
    "8 bits": AdamW8bit,
}


def kept(make, dtype) -> int:
    """Bytes of the tensors that an optimizer has of weights of several shapes after a step."""
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = make(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(state.numel() * state.element_size() for state in states if torch.is_tensor(state) and state.dim())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_any_shape(name, dtype):
    make = OPTIMIZERS[name]
    cost = cost_of(lambda parameters: make(parameters, lr=1e-4), dtype)
    assert cost.states(dict.fromkeys(SHAPES, 1)) == pytest.approx(kept(make, dtype), rel=0.002, abs=1)


def test_states_of_tensors_that_are_made_of_others():
    from torchao.optim import AdamW8bit as LowBit

    cost = cost_of(lambda parameters: LowBit(parameters, lr=1e-4), torch.float32)
    # Two moments of a byte a number, and of each a float32 scale for 256 numbers; a table of 256 codes beside each.
    assert cost.states({(1024, 1024): 1}) == 1024**2 * 2 * (1 + 4 / 256) + 2 * 256 * 4
    assert cost.workspace == 0, "PyTorch compiles its step"


def test_what_ways_say_of_optimizers_is_what_these_keep():
    for known, make in ((ADAFACTOR, torch.optim.Adafactor), (ADAMW_8BIT, AdamW8bit), (adamw(4), OPTIMIZERS["AdamW"])):
        found = cost_of(lambda parameters, make=make: make(parameters, lr=1e-4), torch.float32)
        assert found.matrix == pytest.approx(known.matrix, abs=1e-6)
        assert found.vector == pytest.approx(known.vector, abs=1e-6)
        assert found.workspace == pytest.approx(known.workspace, abs=0.05)


def test_a_step_takes_what_it_makes_beside_its_states():
    class Copying(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                first = parameter.detach() * 2
                second = first + 1
                del first
                parameter.data.add_(second * 3)

    # At the end there are the second copy and the third.
    assert cost_of(lambda parameters: Copying(parameters, lr=1e-4), torch.float32).workspace == 8


def test_an_optimizer_that_cannot_step_is_one_line():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no closure")

    with pytest.raises(FireflyError, match=r"^model.optimizer: a trial step failed \(.*no closure.*\); it cannot be"):
        cost_of(lambda parameters: Broken(parameters, lr=1e-4), torch.float32)
