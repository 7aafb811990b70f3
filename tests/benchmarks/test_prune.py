"""The script prunes a checkpoint in shards in two ways, and finds every weight where it belongs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.prune import same_weights
from tests.conftest import train_tokenizer
from tests.support.helpers import json_lines, run_benchmark


def test_two_ways_to_the_same_weights(model_folder, reviews, tmp_path):
    small = train_tokenizer(reviews, 900)  # the same merges, but fewer
    small.save_pretrained(tmp_path / "small")
    own = ["--large", model_folder, "--small", tmp_path / "small", "--layers", 2, "--hidden", 64, "--heads", 2]
    own += ["--vocabulary", 1600, "--form", "bin", "--shard_gb", 2e-4, "--out", tmp_path / "prune.png"]
    other = tmp_path / "other"
    other.mkdir()
    own += ["--folders", tmp_path, other, "--systems", "firefly", "llmpruner"]
    _, ours, theirs, whole, *again = json_lines(run_benchmark("prune", *own))
    assert [line.get("system") for line in again] == ["firefly", "llmpruner", None]
    assert ours["file_system"] == whole["of"] != ""
    assert ours["same_weights"] is theirs["same_weights"] is True
    fewer = (1600 - 900) * 64 * 2 + sum(map(tokenizer_bytes, (model_folder, tmp_path / "small"), (1, -1)))
    assert ours["read_gb"] - ours["written_gb"] == pytest.approx(fewer / 1e9, abs=2e-5)  # archives have headers
    assert whole["times_as_long"]["llmpruner"] == pytest.approx(theirs["seconds"] / ours["seconds"], abs=0.01)
    assert (tmp_path / "prune.png").stat().st_size > 5000


def tokenizer_bytes(folder, sign):
    return sign * (folder / "tokenizer.json").stat().st_size


def test_a_wrong_row_is_found(model_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    tensors = load_file(model_folder / "model.safetensors")
    save_file(tensors, out / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, bare / "a.safetensors")
    assert same_weights(bare, out)
    tensors["transformer.word_embeddings.weight"][[7, 8]] = tensors["transformer.word_embeddings.weight"][[8, 7]]
    save_file(tensors, out / "model.safetensors")
    assert not same_weights(bare, out)
    assert torch.isfinite(tensors["transformer.word_embeddings.weight"]).all()


def test_linked_is_the_same_model(model_folder, reviews, tmp_path):
    train_tokenizer(reviews, 900).save_pretrained(tmp_path / "small")
    own = ["--large", model_folder, "--small", tmp_path / "small", "--layers", 40, "--hidden", 256, "--heads", 2]
    own += ["--vocabulary", 1600, "--shard_gb", 0.01, "--folders", tmp_path]
    _, ours, linked, whole = json_lines(run_benchmark("prune", "--systems", "firefly", "linked", *own))
    assert ours["same_weights"] is linked["same_weights"] is True
    assert ours["written_gb"] == pytest.approx(linked["written_gb"], abs=1e-4)  # headers
    assert set(whole["seconds"]) == {"firefly", "linked"}
