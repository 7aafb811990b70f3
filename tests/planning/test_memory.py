"""What strategies hold a parameter: the published formulas, and beside them what the engines are known to keep."""

from dataclasses import replace

import pytest

from firefly_lightning.planning.memory import estimate
from firefly_lightning.planning.runs import Load, ModelSize, Run

MODEL = ModelSize(1000, 4096, 40, 32)
COUNT = MODEL.parameters
LOAD = Load(1, 1, 1, 1)
STATES = ("weights", "master copy", "moments", "gradients")

# Bytes a parameter of N devices: weights, master copy, moments; gradients apart, since engines keep them at different
# times. Rajbhandari et al. 2020 for ZeRO in mixed precision: 2 + 12/N, and 14/N in all for stage 3 with its gradients.
MIXED = {
    "ddp": lambda n: (4, 0, 8),
    "zero1": lambda n: (2, 4 / n, 8 / n),
    "zero2": lambda n: (2, 4 / n, 8 / n),
    "zero3": lambda n: (2 / n, 4 / n, 8 / n),
    "gemini": lambda n: (2 / n, 4 / n, 8 / n),
    "fsdp2": lambda n: (4 / n, 0, 8 / n),
    "tensor_parallel": lambda n: (2 / n, 4 / n, 8 / n),
    "native_tp": lambda n: (4 / n, 0, 8 / n),
}
SINGLE = {
    "ddp": lambda n: (4, 0, 8),
    "zero1": lambda n: (4, 4 / n, 8 / n),
    "zero3": lambda n: (4 / n, 0, 8 / n),
    "fsdp2": lambda n: (4 / n, 0, 8 / n),
    "native_tp": lambda n: (4 / n, 0, 8 / n),
}


def held(strategy, devices, precision, device="cuda"):
    """Bytes a parameter at the moment of the optimizer's step."""
    takes = estimate(Run(MODEL, strategy, devices, LOAD, 1, precision, device=device))
    return [takes.moments["step"][part] / COUNT for part in STATES], takes


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(("precision", "formulas"), [("bf16-mixed", MIXED), ("32-true", SINGLE)])
def test_states_are_split_as_published(devices, precision, formulas):
    for strategy, formula in formulas.items():
        (*states, _), _ = held(strategy, devices, precision)
        assert states == pytest.approx(formula(devices), rel=2e-3), strategy  # norms are whole in tensor parallelism


def test_float32_masters_are_a_second_copy_where_the_device_is_a_cpu():
    """DeepSpeed compares ``cpu`` with ``cpu:0``, and copies."""
    assert held("zero3", 2, "32-true", "cpu")[0][1] == pytest.approx(2)


def test_gradients_pass_through_buffers_of_a_fixed_size_on_a_gpu_and_are_whole_under_ddp():
    assert estimate(Run(MODEL, "ddp", 8, LOAD)).parts["buffers"] == 4 * COUNT
    reduction = estimate(Run(MODEL, "zero2", 8, LOAD, 1, "bf16-mixed")).moments["reduction"]
    assert reduction["buffers"] == 3 * 200_000_000 * 2  # two, and what of one is flattened to be reduced
    assert reduction["gradients"] == pytest.approx(2 * COUNT / 8)
    whole = estimate(Run(MODEL, "zero1", 8, LOAD, 4, "bf16-mixed")).moments["forward"]
    assert whole["gradients"] == 2 * COUNT, "stage 1 accumulates all of them"


@pytest.mark.parametrize(("strategy", "on_host"), [("zero2_offload", 4 + 8 + 4 + 2), ("gemini_offload", 2 + 4 + 8)])
def test_what_is_offloaded_is_on_the_host_and_not_on_the_device(strategy, on_host):
    takes = estimate(Run(MODEL, strategy, 2, LOAD, 1, "bf16-mixed"))
    assert sum(takes.host.values()) == pytest.approx(on_host * COUNT / 2, rel=2e-3)
    assert takes.parts["moments"] == takes.parts["master copy"] == 0


def test_the_peak_is_the_moment_that_needs_most():
    takes = estimate(Run(MODEL, "zero2", 2, Load.full(64, 512), 1, "bf16-mixed"))
    sums = {name: sum(parts.values()) for name, parts in takes.moments.items()}
    assert takes.peak == sums[takes.peak_at] == max(sums.values())
    assert len(set(sums.values())) > 1


def test_a_copy_of_what_is_saved_is_held_on_the_host():
    """Weight and two moments in float32, 12 bytes a parameter: all in the first process, or shared where a model is."""
    for strategy, devices, copied in (("auto", 1, 12), ("ddp", 8, 12), ("zero2", 8, 12 / 8), ("fsdp2", 4, 12 / 4)):
        run = Run(MODEL, strategy, devices, LOAD, 1, "bf16-mixed")
        plain, aside = estimate(run), estimate(replace(run, copies_saves=True))
        assert sum(aside.host.values()) - sum(plain.host.values()) == pytest.approx(copied * COUNT), strategy
        assert aside.moments == plain.moments
