import json
import shutil
from pathlib import Path

import pytest
import torch

from firefly_lightning.errors import FireflyError
from firefly_lightning.pruning.command import prune
from tests.support.pruning_fixtures import EMBEDDING, reviews, save_weights, small_bloom, weights, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_bloom(tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(model, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return [str(write(tmp_path_factory.mktemp("corpus") / "corpus.txt", "\n".join(reviews()[1000:1020])))]


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def drop_embedding(folder: Path) -> None:
    save_weights(
        {name: tensor for name, tensor in weights(folder).items() if name != EMBEDDING}, folder, "safetensors", 1
    )


def lose_a_shard(folder: Path) -> None:
    save_weights(weights(folder), folder, "bin", 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def shrink(folder: Path) -> None:
    tensors = weights(folder)
    save_weights({**tensors, EMBEDDING: tensors[EMBEDDING][:700]}, folder, "safetensors", 1)
    edit(folder / "config.json", vocab_size=700)


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def other_kind(folder: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, "unk_token": "<unk>"}
    edit(folder / "tokenizer.json", model=words, added_tokens=[], post_processor=None)


def as_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    write(folder / "adapter_config.json", json.dumps({"base_model_name_or_path": "x"}))


BROKEN_MODELS = {
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json: not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "is a gpt2 model; only Bloom models can be used": lambda folder: edit(folder / "config.json", model_type="gpt2"),
    "is an adapter of x, not a whole model": as_adapter,
    "top_k is -5": lambda folder: write(folder / "generation_config.json", json.dumps({"top_k": -5})),
    "n_layer is 0": lambda folder: edit(folder / "config.json", n_layer=0),
    "has no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pytorch_model-00002-of-00002.bin of pytorch_model.bin.index.json missing": lose_a_shard,
    "is no complete safetensors file": cut,
    "is no complete PyTorch checkpoint": lambda folder: (folder / "model.safetensors").rename(
        folder / "pytorch_model.bin"
    ),
    "hold no word_embeddings.weight": drop_embedding,
    "hold no lm_head.weight": lambda folder: edit(folder / "config.json", tie_word_embeddings=False),
    "has no pad_token <pad>": lambda folder: edit(folder / "tokenizer_config.json", pad_token=None),
    "the tokenizer has 806 tokens, the model's vocabulary only 700": shrink,
    "says vocab_size is 999, the weights have 1,000": lambda folder: edit(folder / "config.json", vocab_size=999),
    "has no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "the tokenizer cannot be read": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    r"is no byte-level BPE tokenizer \(WordLevel\)": other_kind,
}


@pytest.mark.parametrize("message", BROKEN_MODELS)
def test_broken_models_are_refused(copied, corpus, tmp_path, message):
    BROKEN_MODELS[message](copied)
    with pytest.raises(FireflyError, match=message) as caught:
        prune(str(copied), str(tmp_path / "out"), corpus)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": None}, "neither is given"),
        ({"tokenizer": "x"}, "both are given"),
        ({"corpus": None, "tokenizer": "x", "keep": "y"}, "belong to --corpus"),
        ({"min_count": 0}, "--min_count: 0 is less than 1"),
        ({"pad_multiple": 0}, "--pad_multiple: 0 is less than 1"),
        ({"corpus": ["missing.txt"]}, "missing.txt: no such file"),
        ({"corpus": ["missing.jsonl"]}, "missing.jsonl: no such file"),
        ({"keep": "missing.txt"}, "missing.txt: no such file"),
        ({"verify": "missing.txt"}, "missing.txt: No such file"),
        ({"verify": "empty.txt"}, "empty.txt: has no text to verify with"),
        ({"corpus": ["gbk.txt"]}, "gbk.txt:2: byte 0xba is not UTF-8"),
        ({"corpus": ["empty.txt"]}, "empty.txt: no text to count tokens in"),
        ({"out": "gbk.txt"}, "gbk.txt: is a file"),
        ({"out": "full"}, "full: is not empty"),
    ],
)
def test_wrong_arguments_are_refused(model, corpus, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gbk.txt").write_bytes(b"ok\n" + "好".encode("gbk"))
    write(tmp_path / "empty.txt", "\n\n")
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "mine", "precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FireflyError, match=message):
        prune(**{"model": str(model), "out": "out", "corpus": corpus, **arguments})
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_pytorch_before_1_6_are_called_so_and_read_once_saved_anew(copied, corpus, tmp_path):
    held = weights(copied)
    (copied / "model.safetensors").unlink()
    file = copied / "pytorch_model.bin"
    torch.save(held, file, _use_new_zipfile_serialization=False)
    with pytest.raises(FireflyError, match=r"is of PyTorch before 1\.6, which cannot be read in parts") as caught:
        prune(str(copied), str(tmp_path / "out"), corpus)
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(code)  # what the message says to do
    prune(str(copied), str(tmp_path / "out"), corpus)


@pytest.mark.parametrize("held", [[1, 2], {"a": 1}, {"a": {"b": 2}}])
def test_a_file_that_holds_no_weights_is_refused(copied, corpus, tmp_path, held):
    (copied / "model.safetensors").unlink()
    torch.save(held, copied / "pytorch_model.bin")
    with pytest.raises(FireflyError, match="holds more than the tensors of a model"):
        prune(str(copied), str(tmp_path / "out"), corpus)


@pytest.mark.parametrize("flag", ["corpus", "keep"])
def test_a_mistyped_name_is_told_before_weights_move(flag, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("firefly_lightning.pruning.steps.open_large", None)  # nothing of the model is read
    (tmp_path / "texts.txt").write_text("春风又绿江南岸\n", "utf-8")
    typo = str(tmp_path / "typo.jsonl")
    corpus = [str(tmp_path / "texts.txt"), *([typo] if flag == "corpus" else [])]
    with pytest.raises(FireflyError, match=r"typo\.jsonl: no such file"):
        prune(str(tiny_folder), str(tmp_path / "out"), corpus, keep=typo if flag == "keep" else None)
