"""What a step took, waited for and computed, against sleeps of known length and counted operations."""

import resource
import time
from copy import deepcopy

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.callbacks.throughput import frozen_of, measure_peak, training_flops
from firefly_lightning.data.batches import PlannedBatches
from firefly_lightning.huggingface import load_config
from tests.support.helpers import fit, logged

NAP = 0.05
STEPS = ["--trainer.max_steps", 3, "--data.batch_size", 4, "--data.micro_batch_size", 2]


class SlowBatches(PlannedBatches):
    def __getitem__(self, index):
        time.sleep(NAP)
        return super().__getitem__(index)


class SlowData(FireflyDataModule):
    """Takes its time for every micro-batch."""

    batches = SlowBatches


class Counting(FireflyModule):
    """Logs how many tokens a step has."""

    def training_step(self, batch, batch_idx):
        self.log("tokens", float(batch["step_target_tokens"]))
        return super().training_step(batch, batch_idx)


class Slow(Counting):
    """Takes its time to learn, in which a worker gets ahead."""

    def training_step(self, batch, batch_idx):
        time.sleep(4 * NAP)
        return super().training_step(batch, batch_idx)


def seconds(root) -> list[tuple[float, float]]:
    """Of each step: how long it took by its tokens, and how much of that was waiting."""
    rates, waits = logged(root, "target_tokens_per_second"), logged(root, "data_wait")
    tokens = logged(root, "tokens")
    assert rates.keys() == waits.keys() == {0, 1, 2}
    took = {step: float(tokens[step]) / float(rate) for step, rate in rates.items()}
    return [(took[step], float(waits[step]) * took[step]) for step in rates]


def test_waiting_for_rows_is_told_from_work(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *STEPS, "--data", "tests.callbacks.test_throughput.SlowData",
        "--model", "tests.callbacks.test_throughput.Counting")  # fmt: skip
    for took, waited in seconds(tmp_path):
        assert 2 * NAP <= waited < took


def test_what_a_worker_prepares_in_time_is_not_waited_for(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *STEPS, "--data", "tests.callbacks.test_throughput.SlowData",
        "--model", "tests.callbacks.test_throughput.Slow", "--data.num_workers", 1)  # fmt: skip
    for took, waited in seconds(tmp_path)[1:]:
        assert took >= 8 * NAP
        assert waited == pytest.approx(0, abs=NAP)


def test_operations_are_those_that_stock_bloom_does(bloom):
    ids = torch.arange(40)[None] % 300
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bloom(ids)
    # The backward pass does twice as many as the forward pass; here the head is computed everywhere.
    assert training_flops(bloom.config, [40], targets=40) == 3 * counter.get_total_flops()
    more = training_flops(bloom.config, [40, 25], targets=50)
    alone = [training_flops(bloom.config, [length], targets=25) for length in (40, 25)]
    assert more == pytest.approx(sum(alone))


@pytest.mark.parametrize("layers", ["", "dense", "word_embeddings", "dense_h_to_4h query_key_value word_embeddings"])
def test_operations_of_a_frozen_weight_lack_those_of_its_gradient(bloom, layers):
    frozen = deepcopy(bloom)
    for name, weight in frozen.named_parameters():
        weight.requires_grad_(name.split(".")[-2] not in (layers.split() or [name.split(".")[-2]]))
    inputs = torch.randn(1, 40, bloom.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(frozen(inputs_embeds=inputs).logits.sum())
    assert training_flops(bloom.config, [40], 40, frozen_of(frozen)) == counter.get_total_flops()


def test_weights_of_an_adapter_are_no_part_of_what_is_frozen(bloom):
    frozen = deepcopy(bloom).requires_grad_(False)
    whole = peft.LoraConfig(target_modules=["dense", "dense_h_to_4h"], modules_to_save=["dense_4h_to_h"])
    layers, saved = bloom.config.n_layer, frozen_of(peft.get_peft_model(deepcopy(bloom), whole))
    assert frozen_of(frozen) == (12 * layers, True)
    assert saved == (8 * layers, True)


def test_utilisation_is_the_operations_of_a_step_against_the_peak(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *STEPS, "--model", "tests.callbacks.test_throughput.Counting",
        "--throughput.peak_tflops", 0.5)  # fmt: skip
    data = FireflyDataModule(str(model_folder), str(rows_file), batch_size=4)
    data.prepare_data()
    data.setup("fit")
    for step, utilisation in logged(tmp_path, "mfu").items():
        rows = data.train.plan.rows(step)
        lengths, targets = data.train.rows.lengths[rows].tolist(), int(data.train.rows.target_tokens[rows].sum())
        took = targets / float(logged(tmp_path, "target_tokens_per_second")[step])
        flops = training_flops(load_config(str(model_folder)), lengths, targets)
        assert float(utilisation) == pytest.approx(flops / (took * 0.5e12), rel=1e-4)
    memory = [float(value) for value in logged(tmp_path, "memory_gb").values()]
    assert memory == sorted(memory)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.1 < memory[-1] == pytest.approx(used, rel=0.05)


def test_the_peak_is_that_of_a_product_and_leaves_the_random_state():
    state = torch.get_rng_state()
    peak = measure_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    matrix = torch.ones(512, 512)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    assert peak > 0.2 * 2 * 512**3 / min(times)
