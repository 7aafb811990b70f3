"""Every rung of the ladder is the same step, and what it counts is what it says."""

import numpy as np
import pytest
import torch
from transformers import BloomForCausalLM

from benchmarks.ladder import NAMES, Counted, Levers, make_batches, make_step
from firefly_lightning import FireflyDataModule


def test_every_rung_gives_the_loss_of_the_original_recipe(model_folder, rows_file):
    data = FireflyDataModule(str(model_folder), train_files=str(rows_file), batch_size=6)
    data.prepare_data()
    data.setup("fit")
    assert len(NAMES) == len(Levers._fields) + 1
    losses, taken = [], []
    for rung in range(len(NAMES)):
        levers = Levers(*(index < rung for index in range(len(Levers._fields))))
        model = BloomForCausalLM.from_pretrained(model_folder).float().train()
        still = torch.optim.SGD(model.parameters(), 0.0)
        step, batches = make_step(model, still, levers), make_batches(data, 2, levers)
        targets = [len(batch["target_ids"]) for batch in batches]
        losses.append(np.dot([step(batch) for batch in batches], targets) / sum(targets))
        taken.append(sum(sum(batch["row_lengths"]) for batch in batches))
    assert losses[:-1] == pytest.approx(losses[:1] * (len(NAMES) - 1), rel=1e-5)
    assert losses[-1] == pytest.approx(losses[0], rel=2e-2)
    assert len(set(taken)) == 1


def test_operations_and_bytes_are_counted():
    left, right = torch.zeros(3, 5), torch.zeros(5, 7)
    with Counted() as counted:
        _ = (left @ right).t()
        _ = left + 1
    assert counted.flops == 2 * 3 * 5 * 7
    assert counted.bytes == 2 * left.nbytes


def test_attention_is_counted_forwards_and_backwards():
    query = torch.zeros(1, 2, 6, 8, requires_grad=True)
    with Counted() as counted:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    product = 2 * 2 * 6 * 6 * 8
    assert counted.flops == (2 + 5) * product, "scores and contexts; backwards also the scores again"
