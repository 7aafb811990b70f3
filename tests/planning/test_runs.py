"""Sizes of a model and of a micro-batch, and what cannot be planned."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError
from firefly_lightning.planning.memory import estimate
from firefly_lightning.planning.runs import STRATEGIES, Load, ModelSize, Run

SMALL = ModelSize(1000, 64, 3, 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [(1500, 48, 2, 6), (46145, 2048, 24, 16), (46145, 2560, 30, 32)])
def test_unique_parameters_are_those_that_hugging_face_makes(sizes, tied):
    vocab_size, hidden, layers, heads = sizes
    config = BloomConfig(vocab_size=vocab_size, hidden_size=hidden, n_layer=layers, n_head=heads)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    assert ModelSize.of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_a_strategy_cannot_do_is_refused():
    def run(strategy, devices=2, precision="32-true"):
        return Run(SMALL, strategy, devices, Load.full(1, 8), precision=precision)

    for wrong, says in [
        (run("zero4"), "strategy zero4 is not one that can be planned"),
        (run("ddp", precision="8-bit"), "precision 8-bit is not one that can be planned"),
        (run("auto"), "strategy auto is one device, not 2"),
        (run("native_tp", 3), "3 devices do not divide the model's 4 heads"),
        (run("fsdp2", precision="16-mixed"), "fsdp2: cannot do precision 16-mixed"),
    ]:
        with pytest.raises(FireflyError, match=says):
            estimate(wrong)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_rows_take_more_and_recomputing_takes_no_more(strategy, device):
    for precision in ("32-true", "bf16-mixed"):
        peaks = {}
        for rows in (1, 4, 64):
            for recomputing in (False, True):
                load, devices = Load.full(rows, 512), 1 if strategy == "auto" else 2
                run = Run(ModelSize(46145, 1024, 8, 16), strategy, devices, load, 1, precision, recomputing, device)
                peaks[rows, recomputing] = estimate(run).peak
        assert peaks[1, False] <= peaks[4, False] < peaks[64, False]
        assert all(peaks[rows, True] <= peaks[rows, False] for rows in (1, 4, 64))
        assert peaks[64, True] < peaks[64, False]
