"""What is wrong in a model's folder is said by every command in the same line."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.helpers import fit, one_line, run

COMMANDS = {
    "fit": lambda model, rows, out: fit(model, rows, out, "--trainer.max_steps", 1, check=False),
    "predict": lambda model, rows, out: run(
        "firefly-fit", "predict", "--model.path", model, "--data.predict_files", rows, "--trainer.accelerator", "cpu",
        "--trainer.devices", 1, "--trainer.default_root_dir", out, check=False,
    ),
    "plan": lambda model, rows, out: run("firefly", "plan", "--model", model, check=False),
    "prune": lambda model, rows, out: run(
        "firefly", "prune", "--model", model, "--corpus", rows, "--out", out, check=False
    ),
    "chat": lambda model, rows, out: run("firefly", "chat", "--model", model, "--prompt", "你好", check=False),
}  # fmt: skip


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def change(file: Path, **fields) -> None:
    before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(before | fields), "utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_is_checked_by_every_command(command, model, rows_file, tmp_path):
    change(model / "config.json", n_layer=10**7)
    said = one_line(COMMANDS[command](model, rows_file, tmp_path / "out"))
    assert said.startswith(
        f"{model / 'config.json'}: n_layer is 10000000, not a whole number from 1 to 10,000; mend it"
    )


@pytest.mark.parametrize("command", ["fit", "predict", "prune", "chat"])
def test_settings_of_generation_are_checked_by_every_command_that_reads_them(command, model, rows_file, tmp_path):
    change(model / "generation_config.json", stop_strings=["x"])
    said = one_line(COMMANDS[command](model, rows_file, tmp_path / "out"))
    assert said == f"{model / 'generation_config.json'}: stop_strings cannot be used here; take it out"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_is_called_one_by_every_command(command, model, rows_file, tmp_path):
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (model / name).unlink()
    change(model / "adapter_config.json", base_model_name_or_path="bigscience/bloom-1b7")
    said = one_line(COMMANDS[command](model, rows_file, tmp_path / "out"))
    assert said.startswith(f"{model}: is an adapter of bigscience/bloom-1b7, ")


def test_a_conversation_is_not_answered_with_beams(model, rows_file, tmp_path):
    change(model / "generation_config.json", num_beams=4, max_new_tokens=5)
    said = one_line(COMMANDS["chat"](model, rows_file, tmp_path))
    assert said.startswith(f"{model}: generation_config.json has num_beams 4, with which no answer can be shown as it")


@pytest.mark.parametrize("name", ["start", "end"])
def test_half_a_character_in_a_prompt_format_is_told(name, tiny_folder, rows_file, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "prompt_format.json").write_text(json.dumps({name: "\ud800</s>"}))
    for command in (
        ["firefly", "stats", "--files", rows_file, "--tokenizer", model, "--out", tmp_path / "out"],
        ["firefly", "prune", "--model", model, "--corpus", rows_file, "--out", tmp_path / "out"],
    ):
        line = one_line(run(*command, check=False))
        assert line.startswith(f"{model / 'prompt_format.json'}: prompt format: {name} holds half a surrogate pair")
        assert not (tmp_path / "out").exists()
