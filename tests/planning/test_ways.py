"""How to train in a given memory: what fits is found, best first, and its command trains what was planned."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import yaml

from firefly_lightning.model.adapters import Lora, as_config
from firefly_lightning.planning.memory import estimate
from firefly_lightning.planning.request import read_settings
from firefly_lightning.planning.run_config import adapter_shapes, read_fit, strategy_of, trained_of
from firefly_lightning.planning.runs import ModelSize, numbers
from firefly_lightning.planning.ways import RESERVED, WAYS, lora_shapes, ways
from tests.support.helpers import ROOT, run
from tests.support.readme import page

SIZES = {"vocab_size": 46145, "hidden_size": 2048, "n_layer": 24, "n_head": 16}
FLAGS = [part for name, value in SIZES.items() for part in (f"--{name}", value)]


def settings(tmp_path, precision=None, **config):
    path = tmp_path / "run.yaml"
    model = {"path": "none", **config.pop("model", {})}
    path.write_text(yaml.safe_dump({"model": model, **config}), "utf-8")
    return read_settings([str(path)], None, SIZES, precision, None)


def test_what_fits_takes_no_more_than_the_memory_and_the_best_comes_first(tmp_path):
    limits = {"4GB": 4e9, "12GB": 12e9, "24GB": 24e9}
    found = ways(settings(tmp_path), limits)
    assert [one["way"] for one in found if one["memory"] == "4GB"] == [way.name for way in WAYS]
    for one in found:
        fits = one["micro_batch_size"] > 0
        assert fits == (one["peak"] <= limits[one["memory"]]), one
        assert fits or one["gradient_checkpointing"], "the least is that of recomputing"
    able = {text: {one["way"] for one in found if one["memory"] == text and one["micro_batch_size"]} for text in limits}
    assert able["4GB"] < able["12GB"] < able["24GB"]
    # 16 bytes of 1.3 billion parameters are 20.8 GB, and autocast's copies 2.4: too much where logits come on top.
    assert "all weights, AdamW" not in able["24GB"]
    assert {"all weights, Adafactor", "LoRA"} <= able["24GB"]
    assert "LoRA" in able["4GB"]


def test_releasing_gradients_takes_a_whole_step_at_once(tmp_path):
    found = ways(settings(tmp_path, data={"batch_size": 8}), {"24GB": 24e9, "6GB": 6e9})
    released = [one for one in found if "released" in one["way"]]
    assert {one["micro_batch_size"] for one in released} == {0, 8}
    others = {one["way"]: one["peak"] for one in found if one["memory"] == "6GB"}
    # What is left of 4 bytes of 1.3 billion parameters: gradients of the head and of a matrix.
    saved = others["all weights, AdamW"] - others["all weights, AdamW, gradients released"]
    assert 2e9 < saved < 4 * 1.304e9


@pytest.mark.parametrize("memory", ["12GB"])
def test_commands_train_what_was_planned(tmp_path, memory):
    given = settings(tmp_path, trainer={"precision": "32-true"}, model={"gradient_checkpointing": True})
    found = ways(given, {memory: float(memory[:-2]) * 1e9})
    assert len(found) == len(WAYS)
    for one in found:
        words = shlex.split(one["command"])
        assert words[:2] == ["firefly-fit", "fit"]
        assert words[2:4] == ["--config", str(tmp_path / "run.yaml")]
        if "--model.release_gradients" in words and not hasattr(given.fit.model.init_args, "release_gradients"):
            continue
        fit = read_fit(words[2:])
        precision = str(fit.trainer.precision)
        read = replace(given, fit=fit, precision=precision, trained=trained_of(fit.model, given.model, precision))
        strategy = strategy_of(fit.trainer, 1)
        taken = read.run(strategy, 1, read.own_rows(strategy, 1), read.checkpointing, refuse=True)
        assert estimate(taken).peak + RESERVED == pytest.approx(one["peak"], rel=1e-3), one
        assert read.checkpointing == one["gradient_checkpointing"]


def test_weights_of_lora_are_those_that_peft_makes():
    model = ModelSize(1000, 64, 3, 4)
    for rank in (1, 8):
        assert lora_shapes(model, rank) == adapter_shapes(model, as_config(Lora(rank=rank)))
    # A rank of 8 times inner and outer sides of four layers: h + 3h, h + h, h + 4h, 4h + h.
    assert numbers(lora_shapes(model, 8)) == 3 * 8 * 16 * 64


def test_the_command_answers_for_each_memory(tmp_path):
    result = run("firefly", "plan", *FLAGS, "--memory", "8GB", "1GiB", "--out", tmp_path / "plan")
    assert "GB a device" not in result.stdout, "the answer is not buried under tables of strategies"
    first, second = result.stdout.split("1GiB on one device")
    assert "8GB on one device, 0.5 GB of it for CUDA: best first" in first
    assert "firefly-fit fit --model.path . --data.train_files ROWS.jsonl --model.adapter lora" in first
    assert re.search(r"Nothing fits into 1GiB; the least is 1\.\d GB: QLoRA", second)
    assert "firefly-fit" not in second
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text("utf-8"))
    assert {one["memory"] for one in plan["ways"]} == {"8GB", "1GiB"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documented_table_is_what_is_computed(language, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = re.findall(r"^\| .* \| `(\S+)` \| (.*) \|$", page("cards", language), re.MULTILINE)
    limits = {f"{size}GB": size * 1e9 for size in (8, 12, 16, 24)}
    computed = [[way.precision or "bf16-mixed"] for way in WAYS]
    for name, sizes in (("1b4", SIZES), ("2b6", SIZES | {"hidden_size": 2560, "n_layer": 30, "n_head": 32})):
        found = ways(read_settings([f"configs/firefly-{name}.yaml"], None, sizes, None, None), limits)
        for place, way in enumerate(WAYS):
            for one in (one for one in found if one["way"] == way.name):
                again = " ↻" if one["gradient_checkpointing"] else ""
                computed[place].append(f"{one['micro_batch_size']}{again}" if one["micro_batch_size"] else "–")
    assert [[precision, *cells.split(" | ")] for precision, cells in shown if cells.count("|") == 7] == computed


def test_a_cpu_is_its_own_host(tmp_path):
    given = settings(tmp_path, trainer={"accelerator": "cpu"})
    found = ways(given, {"16GB": 16e9})
    assert {one["kind"] for one in found} == {"all", "adapter"}
    assert {one["precision"] for one in found} == {"32-true", "bf16-true"}
