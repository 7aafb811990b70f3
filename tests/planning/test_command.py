"""firefly plan as a user types it: what it prints and writes, what is documented of that, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.planning.command import plan
from firefly_lightning.planning.run_config import devices_of, read_fit, strategy_of
from firefly_lightning.planning.runs import STRATEGIES
from firefly_lightning.tools import gather_lists, join_configs
from tests.support.helpers import ROOT, one_line, run
from tests.support.readme import DOCS, commands, page, read_blocks

SIZES = ["--vocab_size", 1000, "--hidden_size", 64, "--n_layer", 2, "--n_head", 4]


@pytest.fixture
def config(tmp_path, model_folder, rows_file):
    """A run on 60 rows, four at a time of eight a step."""
    path = tmp_path / "run.yaml"
    data = {"train_files": str(rows_file), "batch_size": 8, "micro_batch_size": 4}
    path.write_text(yaml.safe_dump({"model": {"path": str(model_folder)}, "data": data}), "utf-8")
    return path


def printed(text: str, title: str) -> dict[str, list[str]]:
    """Cells of the table below a title, by the name that begins their line."""
    lines = text.split(title)[1].splitlines()[1:]
    end = next((at for at, line in enumerate(lines) if at > 3 and not line.startswith(" ")), len(lines))
    return {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in lines[:end] if re.match(r" \w+  ", line)}


def documented(pattern: str, language: str = "en") -> list[str]:
    """Commands of the page that begin so."""
    return [one for one in commands(read_blocks(DOCS / language / "planning.md")) if re.match(pattern, one)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documented_table_is_what_the_commands_print(language, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page("planning", language)
    rows = re.findall(r"^\| `(\w+)` \| (\d+\.\d / .*) \|$", text, re.MULTILINE)
    shown = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert list(shown) == list(STRATEGIES)
    shown_commands = documented(r"firefly plan .*--vocab_size", language)
    assert len(shown_commands) == 2
    for place, command in enumerate(shown_commands):
        out = run(*shlex.split(command)).stdout
        assert re.search(r"model: ([\d,]+) parameters", out)[1] in page("strategies", language)
        totals = printed(out, "GB a device, 1 device, by rows of a micro-batch: plain / checkpointed")
        fits = [printed(out, f"Most rows of a micro-batch in {memory}:") for memory in ("24GB", "80GB")]
        for name, cells in shown.items():
            total, *most = cells[3 * place : 3 * place + 3]
            assert re.match(r"[\d.]+ / [\d.]+", total)[0] == totals[name][0], (name, command)
            assert most == [fit[name][0] for fit in fits], (name, command)
            assert ("offload" in name) == bool(re.search(r"\d$", total.split(" / ")[1].partition(" ")[2])), name


def test_the_documented_host_memory_is_what_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page("planning")
    (command,) = documented(r"firefly plan .*firefly-1b4.*--vocab_size")
    run(*shlex.split(command), "--micro_batch_sizes", 1, "--out", tmp_path / "plan")
    planned = json.loads((tmp_path / "plan" / "plan.json").read_text("utf-8"))
    found = {one["strategy"]: sum(one["host"].values()) / 1e9 for one in planned["runs"] if one["host"]}
    shown = dict(re.findall(r"^\| `(\w+)` \| [\d.]+ / [\d.]+, host ([\d.]+)", text, re.MULTILINE))
    assert {name: f"{host:.1f}" for name, host in found.items()} == shown


def test_a_plan_counts_the_rows_of_the_data(config, model_folder, rows_file, tmp_path):
    asked = ["--memory", "1GiB", "500MB", "--strategies", *STRATEGIES]
    result = run("firefly", "plan", "--config", config, *asked, "--out", tmp_path / "plan")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text("utf-8"))
    assert (tmp_path / "plan" / "memory.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = load_tokenizer(str(model_folder))
    lengths = []
    for row in read_rows(str(rows_file)):  # <s> input </s></s> target </s>, with </s> between later turns
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for turn in row.turns for part in turn]
        lengths.append(sum(map(len, ids)) + 4 + 2 * (len(row.turns) - 1))
    assert plan["epoch"]["rows"] == len(lengths) == 60
    assert plan["epoch"]["steps"] == -(-60 // 8)
    assert plan["epoch"]["tokens"] == sum(lengths)
    longest = np.sort(lengths)[::-1]
    tokens = {one["micro_batch_size"]: one["tokens"] for one in plan["runs"]}
    assert tokens == {rows: longest[:rows].sum() for rows in (1, 2, 4, 8)}
    assert {(fit["memory"], fit["strategy"]) for fit in plan["largest_micro_batch"]} == {
        (memory, name) for memory in ("1GiB", "500MB") for name in STRATEGIES
    }
    assert "micro-batches of 4 rows" in result.stdout
    assert "the run: 8,000 steps, 1,000.00 epochs" in result.stdout  # Lightning's own default
    assert plan["steps"] == 8000
    for fit in plan["largest_micro_batch"]:
        limit = {"1GiB": 2**30, "500MB": 500e6}[fit["memory"]]
        for key, recomputing in (("plain", False), ("checkpointed", True)):
            peaks = {
                one["micro_batch_size"]: one["peak"]
                for one in plan["runs"]
                if (one["strategy"], one["devices"], one["gradient_checkpointing"])
                == (fit["strategy"], fit["devices"], recomputing)
            }
            assert fit[key] == max((rows for rows, peak in peaks.items() if peak <= limit), default=0)


def test_files_and_models_that_are_not_here(config, tmp_path):
    out = run("firefly", "plan", "--model", tmp_path, *SIZES, "--devices", 1, 2).stdout
    assert "rows: each is taken for 512 tokens, all of them learned" in out
    assert "GB a device, 2 devices" in out
    missing = tmp_path / "missing.yaml"
    missing.write_text("data: {train_files: nothing/here.jsonl}", "utf-8")
    out = run("firefly", "plan", "--config", config, "--config", missing, "--devices", 1).stdout
    assert "nothing/here.jsonl: no such file" in out
    assert "rows: each is taken for 512 tokens" in out
    line = one_line(run("firefly", "plan", "--model", tmp_path / "none", check=False))
    assert line.endswith("a model that is not here is planned by --vocab_size, --hidden_size, --n_layer and --n_head")


def test_a_model_is_read_from_its_config_json(model_folder):
    out = run("firefly", "plan", "--model", model_folder / "config.json", "--devices", 1).stdout
    # 1,500 · 48 + 2 · (12 · 48² + 13 · 48) + 4 · 48
    assert "model: 128,736 parameters" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no model to plan; give --config FILE, --model FOLDER, or --vocab_size"),
        (SIZES[:6], "--n_head is missing; the sizes of a model are vocab_size, hidden_size, n_layer, n_head"),
        ([*SIZES, "--memory", "24"], "--memory 24: give a number and a unit"),
        ([*SIZES, "--strategies", "zero9"], "strategy zero9 is not one that can be planned"),
        ([*SIZES, "--precision", "64-true"], "precision 64-true is not one that can be planned"),
        ([*SIZES, "--devices", "17"], "none of these strategies, devices and micro-batches go together"),
        ([*SIZES, "--devices", "0"], "--devices is 0; it must be at least 1"),
        ([*SIZES, "--measure"], "--measure trains the model of --config: leave --vocab_size"),
        (["--model", "MODEL", "--devices", "1", "--measure"], "--measure trains: it needs --config"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, says, model_folder):
    arguments = [model_folder if argument == "MODEL" else argument for argument in arguments]
    if says.startswith("none of"):
        arguments = [*arguments, "--strategies", "zero1"]
    assert says in one_line(run("firefly", "plan", *arguments, check=False))


def test_strategies_and_devices_as_configurations_name_them():
    def fit(*arguments):
        return read_fit(["--model.path", "x", *map(str, arguments)]).trainer

    assert strategy_of(fit(), 1) == "auto"
    assert strategy_of(fit(), 2) == "ddp"
    for file in (ROOT / "configs" / "strategy").glob("*.yaml"):
        assert strategy_of(fit("--config", file), 2) == file.stem
    zero = {"class_path": "firefly_lightning.strategies.ZeroStrategy", "init_args": {"stage": 3}}
    assert strategy_of(fit("--trainer.strategy", json.dumps(zero)), 2) == "zero3"
    assert devices_of(fit("--trainer.devices", 4, "--trainer.num_nodes", 2)) == 8
    assert devices_of(fit("--trainer.devices", "[0,1,3]")) == 3
    assert devices_of(fit("--trainer.accelerator", "cpu")) == 1


def test_flags_of_a_plan():
    assert join_configs(["plan", "--config", "a", "b", "--out", "c", "--config=d"]) == [
        "plan", "--out", "c", "--configs", "a", "b", "d"
    ]  # fmt: skip
    assert join_configs(["stats", "--config", "a"]) == ["stats", "--config", "a"]
    given = ["--measure", "--devices", "1", "2"]
    assert list(gather_lists(given, plan)) == ["--measure", "true", "--devices", '["1", "2"]']
    assert list(gather_lists(["--memory=8GB", "12GB"], plan)) == ["--memory", '["8GB", "12GB"]']
    assert list(gather_lists(["--measure", "false"], plan)) == ["--measure", "false"]


def test_pairs_are_planned_as_two_rows(tmp_path, model_folder, pairs_file):
    """By their real lengths; where they are not here, each is taken for two rows of the greatest length."""

    def planned(files: str, what: str, rows: int) -> tuple[str, dict]:
        model = {"class_path": f"firefly_lightning.{what}Module", "init_args": {"path": str(model_folder)}}
        data = {"train_files": files, "batch_size": 8, "max_length": 100}
        config, out = (
            tmp_path / f"{what}-{rows}-{Path(files).name}.yaml",
            tmp_path / f"{what}-{rows}-{Path(files).name}",
        )
        data = {"class_path": f"firefly_lightning.{what}DataModule", "init_args": data}
        config.write_text(yaml.safe_dump({"model": model, "data": data}), "utf-8")
        own = ["--strategies", "auto", "--devices", 1, "--micro_batch_sizes", rows, "--out", out]
        text = run("firefly", "plan", "--config", config, *own).stdout
        return text, json.loads((out / "plan.json").read_text("utf-8"))

    text, report = planned(str(pairs_file), "Preference", 1)
    assert "5 steps of 8 pairs, 36 pairs" in text
    assert report["epoch"]["rows"] == 36
    text, of_pairs = planned("nobody/pairs", "Preference", 1)
    assert "pairs: each is taken for two rows of 100 tokens" in text
    _, of_rows = planned("nobody/rows", "Firefly", 2)
    assert of_pairs["runs"][0]["device"] == of_rows["runs"][0]["device"]
