"""Fields of a model's JSON files: what real folders say is taken, everything else refused by file and field."""

import json

import pytest
from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.model_json import (
    read_config,
    read_generation_config,
    read_index,
    refuse_adapter,
)
from tests.support.helpers import raised_line

PUBLISHED = {
    "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"], "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
    "model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
    "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True,
    "slow_but_exact": False, "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
}  # fmt: skip
"""As the published Blooms have it, with older names of fields."""

OTHER_KINDS = [None, True, "x", -1, 1.5, [], {}, float("nan"), 10**30]

SIZES = ("vocab_size", "hidden_size", "n_layer", "n_head", "num_hidden_layers", "num_attention_heads", "pretraining_tp")
SHARES = ("hidden_dropout", "attention_dropout")


def written(path, **fields):
    path.write_text(json.dumps(fields))
    return path


def refusal(read, path) -> str:
    with pytest.raises(FireflyError) as raised:
        read(path)
    assert raised_line(raised).startswith(f"{path}: ")
    return str(raised.value)


def test_configurations_of_real_folders_are_taken(tmp_path):
    assert read_config(written(tmp_path / "config.json", **PUBLISHED)) == PUBLISHED
    own = json.loads(BloomConfig(hidden_size=48, n_layer=2, n_head=6, vocab_size=9).to_json_string())
    assert read_config(written(tmp_path / "config.json", **own)) == own
    read_config(written(tmp_path / "config.json", model_type="bloom"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in (*SIZES, *SHARES, "layer_norm_epsilon", "initializer_range")
        for value in OTHER_KINDS
        if (field, value) != ("initializer_range", 1.5)  # which is one
    ],
    ids=str,
)
def test_a_number_of_the_configuration_is_a_number_in_its_range(tmp_path, field, value):
    message = refusal(read_config, written(tmp_path / "config.json", model_type="bloom", **{field: value}))
    assert f": {field} is " in message
    assert "mend it or fetch it again" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0, not a whole number from 1 to 10,000"),
        ({"n_layer": 10**7}, "n_layer is 10000000"),
        ({"hidden_dropout": 7}, "hidden_dropout is 7, not a number from 0 to 1"),
        ({"torch_dtype": "float7"}, 'torch_dtype is "float7", not one of float32'),
        ({"dtype": 16}, "dtype is 16"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes", not true or false'),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is a list"),
        ({"hidden_size": 10}, "hidden_size 10 is no multiple of n_head 8"),
        ({"n_embed": 1024, "num_attention_heads": 15}, "hidden_size 1024 is no multiple of n_head 15"),
        ({"model_type": "llama"}, "is a llama model; only Bloom models can be used"),
        ({"model_type": ["bloom"]}, "is a nameless model"),
    ],
)
def test_what_no_bloom_can_have_is_named(tmp_path, fields, message):
    assert message in refusal(read_config, written(tmp_path / "config.json", **{"model_type": "bloom", **fields}))


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"\xff{}", b"[" * 100_000, b'{"a": ' * 100_000, b"null"])
@pytest.mark.parametrize("read", [read_config, read_generation_config, read_index])
def test_what_is_no_object_is_refused(tmp_path, read, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    refusal(read, path)


def test_settings_of_real_folders_are_taken(tmp_path):
    for fields in (
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        {"do_sample": True, "temperature": 0.35, "top_p": 0.85, "repetition_penalty": 1.2, "max_new_tokens": 200},
        {"do_sample": False, "temperature": 0.0, "top_k": None, "num_return_sequences": 1, "output_scores": False},
        {"max_length": 20, "num_beams": 4, "early_stopping": "never", "eos_token_id": [2, 3], "guidance_scale": 1.0},
        {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [1], "stop_strings": None, "temperature": 2},
    ):  # fmt: skip
        assert read_generation_config(written(tmp_path / "generation_config.json", **fields)) == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -5}, "top_k is -5, not a whole number from 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 2}, "top_p is 2, not a number from 0 to 1"),
        ({"temperature": 0, "do_sample": True}, "temperature is 0, not a number above 0"),
        ({"temperature": "hot"}, 'temperature is "hot"'),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is true"),
        ({"do_sample": 1}, "do_sample is 1, not true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is"),
        ({"bad_words_ids": [5]}, "bad_words_ids is a list, not lists of token numbers"),
        ({"stop_strings": ["x"]}, "stop_strings cannot be used here; take it out"),
        ({"constraints": [{}], "num_return_sequences": 2}, "constraints, num_return_sequences cannot be used here"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate cannot be used here"),
        ({"stop_strings": ""}, "stop_strings cannot be used here"),
        ({"guidance_scale": 0}, "guidance_scale cannot be used here"),
        ({"bad_words_ids": []}, "bad_words_ids is a list, not lists of token numbers"),
        ({"suppress_tokens": 3}, "suppress_tokens is 3, not some numbers of tokens"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path, fields, message):
    assert message in refusal(read_generation_config, written(tmp_path / "generation_config.json", **fields))


NO_FILES = [*(value for value in OTHER_KINDS if value != "x"), "", "..", "../a", "/etc/passwd", "a/b", "a\0b"]


@pytest.mark.parametrize("value", NO_FILES, ids=str)
def test_an_index_names_files_beside_it(tmp_path, value):
    refusal(read_index, written(tmp_path / "i.json", weight_map={"a": value}))
    if not isinstance(value, dict):
        refusal(read_index, written(tmp_path / "i.json", weight_map=value))


def test_the_files_of_an_index_are_there(tmp_path):
    index = written(tmp_path / "i.json", weight_map={"a": "one.bin", "b": "two.bin", "c": "one.bin"})
    (tmp_path / "one.bin").touch()
    with pytest.raises(FireflyError, match=r"two\.bin of i\.json missing; download the rest"):
        read_index(index)
    (tmp_path / "two.bin").touch()
    assert read_index(index) == ["one.bin", "two.bin"]


def test_an_adapter_is_called_one(tmp_path):
    refuse_adapter(tmp_path, "x")
    written(tmp_path / "adapter_config.json", base_model_name_or_path="bigscience/bloom-1b7")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(
        FireflyError, match="x: is an adapter of bigscience/bloom-1b7, not a whole model; merge them: firefly export"
    ):
        refuse_adapter(tmp_path, "x")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refuse_adapter(tmp_path, "x")
