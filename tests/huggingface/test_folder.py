"""Hugging Face folders: what is loaded, and what is refused in one line."""

import json

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from transformers import BloomConfig, GPT2Config, PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.hub import NOT_ASKED
from firefly_lightning.huggingface import (
    check_same_model,
    check_sizes,
    describe,
    load_bloom,
    load_config,
    load_prompt_format,
    load_tokenizer,
)
from firefly_lightning.prompt import PRESETS
from tests.support.helpers import logits, raised_line

TURNS = [("你好，世界", "春风😀"), ("hello ", "world\n"), ("", "还")]
MESSAGES = [
    {"role": role, "content": text} for turn in TURNS for role, text in zip(("user", "assistant"), turn, strict=True)
]


def test_loaded_model_and_tokenizer_are_the_folders(tiny_folder, bloom, tokenizer, capfd):
    loaded = load_bloom(str(tiny_folder), torch.float32)
    assert torch.equal(logits(loaded), logits(bloom))
    assert load_bloom(str(tiny_folder), torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(load_tokenizer(str(tiny_folder)), PreTrainedTokenizerFast)
    assert load_tokenizer(str(tiny_folder))("你好 😀")["input_ids"] == tokenizer("你好 😀")["input_ids"]
    assert "class" not in capfd.readouterr().err


def break_folder(tiny_folder, out, change):
    out.mkdir()
    for file in tiny_folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    change(out)


def without_a_tensor(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    del weights["transformer.h.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def with_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (lambda path: GPT2Config().save_pretrained(path), "is a gpt2 model"),
        (lambda path: (path / "model.safetensors").unlink(), "has no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 100), "the weights cannot be read"),
        (without_a_tensor, "the weights lack transformer.h.1.mlp.dense_h_to_4h.weight"),
        (lambda path: with_config(path, vocab_size=336), "the weights cannot be read"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(tiny_folder, tmp_path, change, message):
    path = tmp_path / "模型"
    break_folder(tiny_folder, path, change)
    with pytest.raises(FireflyError) as raised:
        load_bloom(str(path), torch.float32)
    assert raised_line(raised).startswith(str(path))
    assert message in str(raised.value)


LOADERS = [lambda path: load_bloom(path, torch.float32), load_tokenizer, load_prompt_format]


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_that_is_not_there_is_named(load, tmp_path):
    for path in (str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(FireflyError) as raised:
            load(path)
        assert raised_line(raised) == f"{path}: no such folder; check the path and the working folder"


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_that_is_not_asked_is_named(load):
    with pytest.raises(FireflyError) as raised:
        load("nobody/nothing")
    assert raised_line(raised) == f"nobody/nothing: no such folder here, and {NOT_ASKED}"


def test_a_tokenizer_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FireflyError) as raised:
        load_tokenizer(str(tmp_path))
    assert raised_line(raised) == f"{tmp_path}: has no tokenizer.json; copy the tokenizer's files there"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FireflyError, match="the tokenizer cannot be read") as raised:
        load_tokenizer(str(tmp_path))
    raised_line(raised)


def test_a_checkpoint_in_the_place_of_a_model_is_called_one(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "trainer.ckpt").touch()
    with pytest.raises(FireflyError, match="holds a checkpoint; make a model of it: firefly export --checkpoint"):
        load_config(str(tmp_path / "last.ckpt"))


def test_weights_saved_without_the_head_load(tiny_folder, bloom, tmp_path):
    bloom.transformer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_bloom(str(tmp_path), torch.float32)), logits(bloom))


def test_sizes_that_do_not_belong_together(tokenizer):
    tokens = len(tokenizer.get_vocab())
    for rows in (tokens, tokens + 1023):
        check_sizes(BloomConfig(vocab_size=rows), tokenizer, "x")
    for rows, message in ((tokens - 1, f"x: the tokenizer has {tokens} tokens"), (tokens + 1024, "x: 1024 of")):
        with pytest.raises(FireflyError, match=message):
            check_sizes(BloomConfig(vocab_size=rows), tokenizer, "x")


def test_check_same_model_names_the_size_that_differs(bloom, tokenizer):
    description = describe(bloom.config, tokenizer, PRESETS["firefly"])
    check_same_model(description, bloom.config, "x")
    check_same_model({}, bloom.config, "x")
    with pytest.raises(FireflyError, match="x: has hidden_size 32, but the checkpoint is of a model with 16"):
        check_same_model(description, BloomConfig(vocab_size=328, hidden_size=32, n_layer=2, n_head=2), "x")


ADAPTER = {"base_model_name_or_path": "bigscience/bloom-560m", "peft_type": "LORA"}


LOADERS = [lambda path: load_bloom(path, torch.float32), load_tokenizer]


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_needs_its_base(load, tmp_path):
    alone, upon = tmp_path / "alone", tmp_path / "upon"
    for folder, base in ((alone, tmp_path / "no"), (upon, alone)):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": str(base)}))
    with pytest.raises(FireflyError) as raised:
        load(str(alone))
    assert raised_line(raised).startswith(f"{alone}: is an adapter of {tmp_path / 'no'}, which is not there (")
    with pytest.raises(FireflyError) as raised:
        load(str(upon))
    assert raised_line(raised).startswith(f"{upon}: is an adapter of {alone}, which is one too; merge that first")
    (alone / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FireflyError, match=r"adapter_config\.json: does not name the adapter's base"):
        load(str(alone))


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_of_the_hub_needs_its_base(load, tmp_path, monkeypatch):
    def download(path, name):
        if path != "somebody/lora":
            raise OSError("no network")
        if name != "adapter_config.json":
            raise EntryNotFoundError("404")
        (tmp_path / name).write_text(json.dumps(ADAPTER))
        return str(tmp_path / name)

    monkeypatch.setattr("firefly_lightning.files.hub.hf_hub_download", download)
    with pytest.raises(FireflyError, match="somebody/lora: is an adapter of bigscience/bloom-560m, which is not there"):
        load("somebody/lora")


def test_an_adapter_without_its_own_has_the_tokenizer_of_its_base(tmp_path, tiny_folder, tokenizer):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": str(tiny_folder)}))
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    assert load_config(str(tmp_path)).hidden_size == load_config(str(tiny_folder)).hidden_size


def test_an_adapter_is_no_pickle(tmp_path, tiny_folder):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": str(tiny_folder)}))
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FireflyError, match=r"has no adapter_model\.safetensors"):
        load_bloom(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"n_layer": 0}, "config.json: n_layer is 0"),
        ("config.json", {"n_layer": 1}, r"the weights have transformer\.h\.1\..* which config\.json lacks"),
        ("config.json", {"hidden_dropout": None}, "config.json: hidden_dropout is null"),
        ("generation_config.json", {"top_k": -5}, "generation_config.json: top_k is -5"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "index.json: is no index of weights"),
        ("model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}, "b.safetensors of model.safetensors"),
    ],
)
def test_what_a_file_beside_the_weights_says_is_checked(tiny_folder, tmp_path, name, content, message):
    path = tmp_path / "模型"
    break_folder(tiny_folder, path, lambda path: None)
    before = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps(before | content))
    if "index" in name:
        (path / "model.safetensors").unlink()
    with pytest.raises(FireflyError, match=message) as raised:
        load_bloom(str(path), torch.float32)
    assert raised_line(raised).startswith(str(path))


def test_a_whole_number_is_taken_where_transformers_takes_a_fraction(tiny_folder, tmp_path):
    path = tmp_path / "model"
    settings = {"do_sample": True, "temperature": 2, "repetition_penalty": 1, "top_p": 1, "max_new_tokens": 3}
    break_folder(tiny_folder, path, lambda path: (path / "generation_config.json").write_text(json.dumps(settings)))
    bloom = load_bloom(str(path), torch.float32)
    assert bloom.generate(torch.arange(5)[None], pad_token_id=3).shape[1] > 5
    assert isinstance(bloom.generation_config.temperature, float)


def test_an_empty_special_token_is_refused(tiny_folder, tmp_path):
    """transformers would look for its number until it has no stack left."""
    path = tmp_path / "model"
    break_folder(tiny_folder, path, lambda path: None)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": ""}))
    with pytest.raises(FireflyError, match=r"tokenizer_config\.json has an empty unk_token; mend it"):
        load_tokenizer(str(path))
