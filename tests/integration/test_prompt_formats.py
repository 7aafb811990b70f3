"""A model keeps the prompt format that it was trained with, through every command, unless it is told another one."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BloomForCausalLM

from firefly_lightning import FireflyDataModule, FireflyError
from firefly_lightning.checkpoints.saved_config import differences
from firefly_lightning.data.prompt_choice import choose_format, own_format
from firefly_lightning.huggingface import describe, load_tokenizer, write_description
from firefly_lightning.prompt import PRESETS, PromptEncoder, PromptFormat
from tests.conftest import write_rows
from tests.support.helpers import one_line, raised_line, run
from tests.support.ranks import lean

SINGLE = PRESETS["firefly_single"]


@pytest.fixture(scope="module")
def single(bloom, tokenizer, tmp_path_factory) -> Path:
    """A folder of a model that was trained with `firefly_single`."""
    folder = tmp_path_factory.mktemp("single")
    bloom.save_pretrained(folder)
    write_description(describe(bloom.config, tokenizer, SINGLE), folder)
    return folder


@pytest.fixture(scope="module")
def silent(tiny_folder, tmp_path_factory) -> Path:
    """The same model, of which nothing says how it was trained."""
    return shutil.copytree(tiny_folder, tmp_path_factory.mktemp("silent") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    texts = [("你好", "世界"), ("春风又绿江南岸", "明月何时照我还"), ("hello", "world"), ("你", "好")]
    lines = [{"kind": "Chat", "input": source, "target": target} for source, target in texts]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines)


@pytest.fixture(scope="module")
def trained(single, rows, tmp_path_factory) -> Path:
    """A run that was never told a format, from the folder of `firefly_single`."""
    root = tmp_path_factory.mktemp("trained")
    firefly_fit("fit", single, rows, root)
    return root


@pytest.fixture
def formats(monkeypatch) -> list[PromptFormat]:
    """Every format that rows or questions are put into."""
    noted, init = [], PromptEncoder.__init__

    def note(self, tokenizer, prompt):
        noted.append(prompt)
        init(self, tokenizer, prompt)

    monkeypatch.setattr(PromptEncoder, "__init__", note)
    return noted


def firefly_fit(name: str, model: Path, rows: Path, root: Path, *arguments: object, check: bool = True):
    files = {"fit": "train_files", "validate": "val_files", "test": "test_files", "predict": "predict_files"}
    common = [
        "--model.path", model, f"--data.{files[name]}", rows, "--data.batch_size", 4, "--data.max_length", 64,
        "--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.default_root_dir", root,
        "--trainer.enable_progress_bar", "false", "--model.decoding.max_new_tokens", 2,
    ]  # fmt: skip
    of_fit = ["--trainer.max_steps", 2, "--samples.prompts", "[]", "--model.warmup_steps", 1] if name == "fit" else []
    with lean([name]):
        return run("firefly-fit", name, *common, *of_fit, *arguments, check=check)


def saved_with(checkpoint: Path, out: Path) -> PromptFormat:
    run("firefly", "export", "--checkpoint", checkpoint, "--out", out)
    return PromptFormat(**json.loads((out / "prompt_format.json").read_text()))


def test_a_training_keeps_the_format_of_its_model_and_exports_it(trained, tmp_path):
    exported = tmp_path / "exported"
    assert saved_with(trained / "checkpoints" / "last.ckpt", exported) == SINGLE
    (exported / "prompt_format.json").unlink()
    assert own_format(str(exported), load_tokenizer(str(exported))) == SINGLE, "by its chat template"


@pytest.mark.parametrize("name", ["validate", "test", "predict", "fit"])
@pytest.mark.parametrize("place", ["folder", "checkpoint"])
def test_every_command_takes_the_models_own_format(name, place, single, silent, trained, rows, formats, tmp_path):
    begins = [] if place == "folder" else ["--ckpt_path", trained / "checkpoints" / "last.ckpt"]
    more = ["--trainer.max_steps", 3] if name == "fit" else []
    firefly_fit(name, single if place == "folder" else silent, rows, tmp_path / "run", *begins, *more)
    assert set(formats) == {SINGLE}


@pytest.mark.parametrize("command", ["plan", "stats", "chat"])
def test_so_do_commands_besides_training(command, single, rows, formats, tmp_path):
    config = write_rows(tmp_path / "run.yaml", [{"model": {"path": str(single)}, "data": {"train_files": [str(rows)]}}])
    run("firefly", *{
        "plan": ["plan", "--config", config, "--memory", "24GB"],
        "stats": ["stats", "--files", rows, "--tokenizer", single, "--out", tmp_path / "stats"],
        "chat": ["chat", "--model", single, "--prompt", "你好", "--max_new_tokens", 1, "--device", "cpu"],
    }[command])  # fmt: skip
    assert set(formats) == {SINGLE}


def test_a_format_that_is_told_holds_and_its_difference_is_said(single, trained, rows, formats, tmp_path, caplog):
    caplog.set_level("INFO")
    firefly_fit("validate", single, rows, tmp_path, "--data.prompt", "firefly")
    assert set(formats) == {PRESETS["firefly"]}
    note = f"note: rows are put into firefly, but {single} was trained with firefly_single; leave the prompt format out"
    assert caplog.text.count(note) == 1
    told = ["--data.prompt", "firefly_turns", "--ckpt_path", trained / "checkpoints" / "last.ckpt"]
    firefly_fit("test", single, rows, tmp_path, *told)
    note = "note: rows are put into firefly_turns, but the checkpoint was trained with firefly_single"
    assert caplog.text.count(note) == 1


def test_a_training_does_not_go_on_in_another_format(single, trained, rows, tmp_path):
    told = ["--data.prompt", "firefly", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--trainer.max_steps", 3]
    line = one_line(firefly_fit("fit", single, rows, tmp_path, *told, check=False))
    assert line == (
        "data.prompt: the checkpoint was trained with firefly_single, the rows of this run are in firefly; "
        "resume with firefly_single, or train the exported model anew"
    )


def test_what_a_run_leaves_unsaid_is_no_difference_to_its_checkpoint():
    told = "data: {init_args: {prompt: firefly_single, seed: 1}}"
    spelled = "data: {init_args: {prompt: {start: <s>, separator: </s>}, seed: 1}}"
    unsaid, other = (f"data: {{init_args: {{prompt: {prompt}, seed: 1}}}}" for prompt in ("null", "firefly"))
    assert differences(told, unsaid) == differences(spelled, unsaid) == ""
    assert "data.init_args.prompt" in differences(told, other)
    assert "data.init_args.prompt" in differences(unsaid, other)


def resaved(folder: Path, out: Path) -> Path:
    """What `save_pretrained` makes of a folder, as after merging an adapter: it knows no `prompt_format.json`."""
    for kind in (AutoTokenizer, BloomForCausalLM):
        kind.from_pretrained(folder).save_pretrained(out)
    assert not (out / "prompt_format.json").exists()
    return out


def test_the_chat_template_alone_says_the_format(single, rows, formats, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = resaved(single, tmp_path / "merged")
    result = run("firefly", "chat", "--model", folder, "--prompt", "你好", "--max_new_tokens", 1, "--device", "cpu")
    assert "note" not in result.stderr
    firefly_fit("validate", folder, rows, tmp_path / "run")
    assert f"prompt format: firefly_single, which is that of {folder}" in caplog.text
    assert set(formats) == {SINGLE}


def test_pruning_keeps_the_format_and_its_template(single, rows, tmp_path):
    run("firefly", "prune", "--model", single, "--corpus", rows, "--out", tmp_path / "pruned")
    assert own_format(str(tmp_path / "pruned"), load_tokenizer(str(tmp_path / "pruned"))) == SINGLE
    before = json.loads((single / "prompt_format.json").read_text())
    assert json.loads((tmp_path / "pruned" / "prompt_format.json").read_text()) == before
    merged = resaved(single, tmp_path / "merged")
    run("firefly", "prune", "--model", merged, "--corpus", rows, "--out", tmp_path / "merged-pruned")
    assert json.loads((tmp_path / "merged-pruned" / "prompt_format.json").read_text()) == before


@pytest.mark.parametrize("template", [None, "{{ messages }}", PRESETS["firefly"].chat_template()])
def test_a_ready_made_tokenizer_gets_the_models_template(single, silent, rows, tmp_path, template):
    small = shutil.copytree(silent, tmp_path / "small")
    if template:
        (small / "chat_template.jinja").write_text(template)
    run("firefly", "prune", "--model", single, "--tokenizer", small, "--out", tmp_path / "pruned")
    (tmp_path / "pruned" / "prompt_format.json").unlink()
    assert own_format(str(tmp_path / "pruned"), load_tokenizer(str(tmp_path / "pruned"))) == SINGLE


def test_where_nothing_says_a_format_it_is_firefly(silent, tmp_path):
    said = []
    tokenizer = load_tokenizer(str(silent))
    assert choose_format(None, str(silent), tokenizer, said.append) == PRESETS["firefly"]
    assert said == []
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    assert choose_format(None, str(silent), tokenizer, said.append) == PRESETS["firefly"]
    assert said == [f"note: {silent} has a chat template that is no prompt format; rows are put into firefly"]
    assert choose_format(SINGLE, str(silent), tokenizer, said.append) == SINGLE
    assert len(said) == 1


def test_a_data_module_of_a_program_takes_the_format_of_its_folder(single, rows, tmp_path):
    data = FireflyDataModule(str(single), str(rows), cache_dir=str(tmp_path))
    assert data.prompt == SINGLE
    assert FireflyDataModule(str(single), str(rows), prompt="firefly").prompt == PRESETS["firefly"]
    with pytest.raises(FireflyError, match="no format is called 'chatml'") as raised:
        FireflyDataModule(str(single), str(rows), prompt="chatml")
    raised_line(raised)
