"""Metrics of target tokens by kind, against stock Bloom row by row, on one device and on two processes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomForCausalLM

from tests.conftest import write_rows
from tests.support.helpers import fit, logged, run, run_ranks
from tests.support.predicting import teach
from tests.support.reference import labelled


@pytest.fixture(scope="module")
def val_rows(rows_file, tmp_path_factory):
    """Eleven rows, so that the last batch is short, and a kind that only one rank sees."""
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()[20:31]]
    rows[-1]["kind"] = "对联"
    return write_rows(tmp_path_factory.mktemp("val") / "val.jsonl", rows)


@pytest.fixture(scope="module")
def taught(model_folder, val_rows, tmp_path_factory):
    """Knows some targets, and where some of them end."""
    return teach(model_folder, val_rows, tmp_path_factory.mktemp("taught"), steps=12)


@pytest.fixture(scope="module")
def expected(taught, val_rows) -> dict[str, float]:
    """Every metric by kind, and over all; in float64."""
    model = BloomForCausalLM.from_pretrained(taught).double().eval()
    kinds = [json.loads(line)["kind"] for line in val_rows.read_text("utf-8").splitlines()]
    nlls: dict[str, list[float]] = {}
    hits: dict[str, list[bool]] = {}
    ends: dict[str, list[bool]] = {}
    with torch.no_grad():
        for kind, (ids, labels) in zip(kinds, labelled(taught, val_rows), strict=True):
            logits = model(torch.tensor([ids])).logits[0, :-1]
            for name in (f"_of/{kind}", ""):
                for at, label in enumerate(labels[1:]):
                    if label != -100:
                        nlls.setdefault(name, []).append(float(F.cross_entropy(logits[at], torch.tensor(label))))
                        hits.setdefault(name, []).append(int(logits[at].argmax()) == label)
                ends.setdefault(name, []).append(int(logits[-1].argmax()) == 2)
    assert 0 < sum(ends[""]) < len(kinds) == len(ends[""])
    means = {f"val_{what}{name}": sum(one) / len(one) for what, of in (("accuracy", hits), ("eos_accuracy", ends))
             for name, one in of.items()}  # fmt: skip
    return means | {f"val_perplexity{name}": math.exp(sum(one) / len(one)) for name, one in nlls.items()}


@pytest.mark.parametrize("more", [[], ["--model.attention", "eager"], ["--data.micro_batch_size", 2]])
def test_perplexity_of_each_kind_on_one_device(more, expected, taught, rows_file, val_rows, tmp_path):
    own = ["--data.val_files", val_rows, "--data.batch_size", 4, *more, "--trainer.accelerator", "cpu"]
    common = ["--model.path", taught, "--trainer.default_root_dir", tmp_path, "--trainer.devices", 1]
    printed = run("firefly-fit", "validate", *common, *own).stdout
    check(expected, tmp_path)
    for name, value in expected.items():
        assert all(part in printed for part in name.removeprefix("val_").split("_of/"))
        assert f"{value:,.4g}" in printed


def test_perplexity_of_each_kind_on_two_processes(expected, taught, val_rows, tmp_path):
    run_ranks(2, [
        "firefly-fit", "validate", "--model.path", taught, "--data.val_files", val_rows, "--data.batch_size", 4,
        "--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "cpu", "--trainer.devices", 2,
        "--trainer.strategy", "ddp", "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    check(expected, tmp_path)


def test_kinds_are_logged_while_fitting(expected, taught, rows_file, val_rows, tmp_path):
    still = ["--model.learning_rate", 0, "--model.warmup_steps", 0, "--trainer.max_steps", 2, "--data.batch_size", 4]
    every = ["--trainer.val_check_interval", 1, "--trainer.check_val_every_n_epoch", "null"]
    fit(taught, rows_file, tmp_path, *still, *every, "--data.val_files", val_rows)
    check(expected, tmp_path, times=2)


def check(expected, root, times: int = 1) -> None:
    for name, value in expected.items():
        found = [float(one) for one in logged(root, name).values()]
        assert found == [pytest.approx(value, rel=1e-5)] * times, name
