"""Which files of a folder are published, and what is refused because it is not whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.published import DESCRIPTION, find_published, stale
from firefly_lightning.huggingface import DESCRIPTION_FILES
from firefly_lightning.pruning.vocabulary import OWN_FILES, SIDE_FILES
from tests.support.helpers import raised_line


@pytest.fixture
def model(tmp_path, tiny_folder):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def in_parts(model):
    """The model with its weights in two files and an index."""
    (model / "model.safetensors").unlink()
    names = {f"model-0000{part}-of-00002.safetensors": f"h.{part}.weight" for part in (1, 2)}
    for file, name in names.items():
        save_file({name: torch.ones(3)}, model / file)
    index = {"weight_map": {name: file for file, name in names.items()}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.fixture
def adapter(tmp_path, model):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    save_file({"lora_A": torch.ones(3)}, folder / "adapter_model.safetensors")
    return folder


def test_all_that_is_written_into_a_model_folder_has_a_place():
    assert {*DESCRIPTION_FILES, *OWN_FILES, *SIDE_FILES, "pruning.json"} <= set(DESCRIPTION)


def test_a_model_in_parts_is_its_parts_and_index(in_parts):
    for name in ("pytorch_model.bin", "training_args.bin", ".env", "model-00003-of-00003.safetensors"):
        (in_parts / name).touch()
    kind, files, left = find_published(in_parts)
    assert kind == "model"
    assert left == [".env", "model-00003-of-00003.safetensors", "pytorch_model.bin", "training_args.bin"]
    assert sorted([*files, *left]) == sorted(path.name for path in in_parts.iterdir())


def test_pictures_are_those_that_the_card_shows(model):
    card = '![a](loss.png) ![b](./kinds.png) <img src="plain.svg"> ![c](../up.png) ![d](missing.png) [e](notes.txt)'
    (model / "README.md").write_text(card)
    for name in ("loss.png", "kinds.png", "plain.svg", "other.png", "notes.txt"):
        (model / name).touch()
    files = find_published(model).files.keys()
    assert {"README.md", "loss.png", "kinds.png", "plain.svg"} <= files
    assert not {"other.png", "notes.txt", "missing.png", "up.png"} & files


def test_an_adapter_has_no_files_of_a_model(adapter):
    (adapter / "config.json").write_text("{}")
    assert find_published(adapter) == (
        "adapter",
        {name: adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")},
        ["config.json"],
    )


def test_what_an_earlier_model_leaves_behind_is_found(in_parts):
    there = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin",
             "chat_template.jinja", "README.md", "loss.png", "notes.md", "a.gguf", "vocab.json"]  # fmt: skip
    gone = ["chat_template.jinja", "model.safetensors", "pytorch_model-00001-of-00002.bin", "vocab.json"]
    assert stale(there, find_published(in_parts).files) == gone


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_model_without_a_file_is_refused(model, name):
    (model / name).unlink()
    with pytest.raises(FireflyError) as raised:
        find_published(model)
    assert raised_line(raised) == f"{model}: has no {name}; push a folder that firefly export wrote"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "is no complete safetensors file"),
        ("model.safetensors", b"\xff" * 200, "is no complete safetensors file"),
        ("config.json", b'{"model_type": "llama"}', "is a llama model"),
        ("config.json", b"{", "not JSON"),
        ("tokenizer.json", b"version https://git-lfs", "not JSON"),
        ("prompt_format.json", b"[]", "must hold a JSON object"),
        ("generation_config.json", b'{"top_p": 7}', "top_p is 7"),
        ("README.md", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(model, name, content, message):
    (model / name).write_bytes(content)
    with pytest.raises(FireflyError) as raised:
        find_published(model)
    assert raised_line(raised).startswith(f"{model / name}: ")
    assert message in raised_line(raised)


def test_weights_that_are_cut_are_refused(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FireflyError, match="is no complete safetensors file"):
        find_published(model)


def test_parts_that_are_not_those_of_the_index_are_refused(in_parts):
    one, two = sorted(in_parts.glob("model-*.safetensors"))
    shutil.copyfile(one, two)
    with pytest.raises(FireflyError, match=r"its files lack h\.2\.weight; export the model again"):
        find_published(in_parts)
    two.unlink()
    with pytest.raises(FireflyError, match=f"{two.name} of model.safetensors.index.json missing"):
        find_published(in_parts)


def test_an_adapter_without_weights_or_base_is_refused(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FireflyError, match=r"has no adapter_model\.safetensors"):
        find_published(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FireflyError, match="does not name the adapter's base"):
        find_published(adapter)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF" + b"\x09" + bytes(100)])
def test_what_is_no_gguf_is_refused(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(FireflyError) as raised:
        find_published(file)
    assert raised_line(raised) == f"{file}: is no GGUF, nor a folder; name what firefly export wrote"


def test_a_folder_that_is_not_there_and_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(FireflyError, match="no such folder or file"):
        find_published(tmp_path / "nowhere")
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(FireflyError, match="holds a checkpoint; make a model of it: firefly export --checkpoint"):
        find_published(tmp_path)
