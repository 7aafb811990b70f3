import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError
from firefly_lightning.pruning import steps
from firefly_lightning.pruning.command import prune
from firefly_lightning.pruning.tensor_files import StoredTensor, count_parameters
from firefly_lightning.pruning.weights_writer import CheckpointWriter
from tests.support.pruning_fixtures import (
    EMBEDDING,
    VOCABULARY,
    idioms,
    large_bloom,
    reviews,
    small_bloom,
    weights,
    write,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_bloom(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return [str(write(tmp_path_factory.mktemp("corpus") / "corpus.txt", "\n".join(reviews()[1000:1020])))]


@pytest.fixture(scope="module")
def pruned(model, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "model"
    prune(str(model), str(out), corpus)
    return out


def vocabulary(folder) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def expected_tokens(model: Path, texts: list[str]) -> list[str]:
    """What is to be kept, in order, by going through all merges until nothing is added."""
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    kept = {*ByteLevel.alphabet(), *SPECIAL, "<|user|>", "<keep>"}
    kept |= {token for text in texts for token in backend.encode(text, add_special_tokens=False).tokens}
    merges = [
        merge.split(" ") for merge in json.loads((model / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    ]
    before = 0
    while len(kept) != before:
        before = len(kept)
        kept |= {part for merge in merges if "".join(merge) in kept for part in merge}
    first = [*SPECIAL, "<|user|>"]
    return first + sorted(kept - set(first), key=backend.get_vocab().__getitem__)


def test_real_vocabulary_on_real_texts(tmp_path_factory, tmp_path):
    large = large_bloom(tmp_path_factory.getbasetemp())
    rows = [{"kind": "Idiom", "input": row["word"], "target": row["explanation"]} for row in idioms()]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    (tmp_path / "reviews.txt").write_text("\n".join(reviews()), "utf-8")
    prune(str(large), str(tmp_path / "out"), [str(tmp_path / "rows.jsonl"), str(tmp_path / "reviews.txt")])

    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (large, tmp_path / "out"))
    assert after.get_vocab_size() < before.get_vocab_size() / 5
    texts = [text for row in rows for text in (row["input"], row["target"])] + reviews()
    old, new = (backend.encode_batch_fast(texts, add_special_tokens=False) for backend in (before, after))
    differing = [text for text, one, other in zip(texts, old, new, strict=True) if one.tokens != other.tokens]
    assert len(texts) > 80_000
    assert not differing
    others = ["🦄 and 👩‍👩‍👧", "Широкая электрификация", "ภาษาไทย", "\x00\u3000\r\n"]
    for text in others:
        assert after.decode(after.encode(text).ids) == text
    check_logits(large, tmp_path / "out", [(old[index].ids, new[index].ids) for index in (1, 3, -1, -2)])


@torch.inference_mode()
def check_logits(large: Path, small: Path, samples) -> None:
    ids = vocabulary(large)
    kept = [ids[token] for token, _ in sorted(vocabulary(small).items(), key=lambda item: item[1])]
    models = [BloomForCausalLM.from_pretrained(folder).eval() for folder in (large, small)]
    for before, after in samples:
        one, other = (model(torch.tensor([ids])).logits[0] for model, ids in zip(models, (before, after), strict=True))
        torch.testing.assert_close(other, one[:, kept], rtol=0, atol=1e-5 * float(one[:, kept].abs().max()))


def test_kept_tokens_and_their_order(model, pruned):
    tokens = vocabulary(pruned)
    assert sorted(tokens, key=tokens.__getitem__) == expected_tokens(model, reviews()[1000:1020])
    assert sorted(tokens.values()) == list(range(len(tokens)))


@pytest.mark.parametrize("load", [AutoTokenizer, PreTrainedTokenizerFast])
def test_tokenizer_loads_with_every_id_renumbered(model, pruned, load):
    tokenizer = load.from_pretrained(pruned)
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids("<|user|>") == 4
    assert tokenizer("<|user|><keep>", add_special_tokens=False).input_ids == [4, len(tokenizer) - 1]
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == "{{ messages }}"
    backend = Tokenizer.from_file(str(pruned / "tokenizer.json"))
    assert backend.encode("好").ids == [1, *backend.encode("好", add_special_tokens=False).ids, 2]
    decoder = json.loads((pruned / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(number): token["content"] for number, token in decoder.items()} == {
        **dict(enumerate([*SPECIAL, "<|user|>"])), len(backend.get_vocab()) - 1: "<keep>"
    }  # fmt: skip


def test_configuration_and_report(model, pruned):
    size = len(vocabulary(pruned))
    config = json.loads((pruned / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 3]
    assert (config["vocab_size"], config["architectures"]) == (size, ["BloomForCausalLM"])
    assert json.loads((pruned / "generation_config.json").read_text())["pad_token_id"] == 3
    report = json.loads((pruned / "pruning.json").read_text())
    numel = [
        sum(p.numel() for p in BloomForCausalLM.from_pretrained(folder).parameters()) for folder in (model, pruned)
    ]
    assert report["parameters"] == {"before": numel[0], "after": numel[1], "ratio": numel[1] / numel[0]}
    assert report["vocabulary"] == {"before": VOCABULARY, "after": size, "ratio": size / VOCABULARY}
    assert report["tokens"]["before"] == 806
    assert report["seconds"] > 0


def test_published_sizes():
    def meta(vocab_size: int) -> BloomForCausalLM:
        with torch.device("meta"):
            return BloomForCausalLM(BloomConfig(vocab_size=vocab_size, hidden_size=2048, n_layer=24, n_head=16))

    before, after = meta(250_880), meta(46_145)
    stored = {name: StoredTensor(name, Path(), 0, "F32", tuple(p.shape)) for name, p in before.named_parameters()}
    assert count_parameters(stored, 250_880) == sum(p.numel() for p in before.parameters()) == 1_722_408_960
    assert count_parameters(stored, 46_145) == sum(p.numel() for p in after.parameters())
    assert f"{count_parameters(stored, 46_145) / count_parameters(stored, 250_880):.2%}" == "75.66%"


def test_min_count_and_keep(model, tmp_path):
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"kind": "k", "input": a, "target": b}) for a, b in [("你们", "你们"), ("我们", "他们")])
    )
    (tmp_path / "keep.txt").write_text("\ufeff我们\r\n\r\n这个", "utf-8")
    prune(str(model), str(tmp_path / "out"), [str(tmp_path / "*.jsonl")], min_count=2, keep=str(tmp_path / "keep.txt"))
    ids = sorted(vocabulary(tmp_path / "out"), key=vocabulary(tmp_path / "out").__getitem__)
    counted = ["你们"] + (["们"] if len(backend.encode("他们", add_special_tokens=False).ids) > 1 else [])
    assert ids == expected_tokens(model, [*counted, "我们", "这个"])
    assert len(ids) < len(expected_tokens(model, ["你们", "我们", "他们", "这个"]))


def test_ready_made_tokenizer(model, pruned, tmp_path):
    small = Path(shutil.copytree(pruned, tmp_path / "small"))
    prune(str(model), str(tmp_path / "out"), tokenizer=str(small), verify=str(write(tmp_path / "t.txt", "很好\n🦄")))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert all(torch.equal(tensor, weights(pruned)[name]) for name, tensor in weights(tmp_path / "out").items())


def test_missing_tokens_are_named(model, pruned, tmp_path):
    small = Path(shutil.copytree(pruned, tmp_path / "small"))
    spec = json.loads((small / "tokenizer.json").read_text("utf-8"))
    size = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {f"new{index}": size + index for index in range(12)}
    (small / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(FireflyError, match=r"12 of its tokens are not in .*'new0', .*'new9', …\)"):
        prune(str(model), str(tmp_path / "out"), tokenizer=str(small))


def test_padding_copies_the_pad_row(model, corpus, pruned, tmp_path):
    prune(str(model), str(tmp_path / "out"), corpus, pad_multiple=64)
    size, plain = len(vocabulary(pruned)), weights(pruned)[EMBEDDING]
    padded = weights(tmp_path / "out")[EMBEDDING]
    assert len(padded) % 64 == 0
    assert 0 < len(padded) - size < 64
    assert torch.equal(padded, torch.cat([plain, plain[3:4].expand(len(padded) - size, -1)]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(padded)
    assert BloomForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().num_embeddings == len(padded)


def test_verification_counts_and_passes(model, corpus, tmp_path, capsys):
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [*reviews()[1000:1020], *reviews()[:50], "🦄 Привет"]
    kept = set(expected_tokens(model, reviews()[1000:1020]))
    whole = sum(kept.issuperset(backend.encode(text, add_special_tokens=False).tokens) for text in texts)
    prune(str(model), str(tmp_path / "out"), corpus, verify=str(write(tmp_path / "texts.txt", "\n".join(texts))))
    verified = json.loads((tmp_path / "out" / "pruning.json").read_text())["verified"]
    assert (verified["same_tokens"], verified["dropped_tokens"]) == (whole, len(texts) - whole)
    assert verified["logits_texts"] == 8
    assert verified["logits_difference"] <= 1e-5
    assert f"{whole} texts in the same tokens" in capsys.readouterr().out


def test_a_corpus_of_documents_and_pairs(model, tmp_path):
    """All their texts count, a prompt once; they also serve to verify with."""
    texts = reviews()[1000:1006]
    pairs = [{"prompt": texts[0], "chosen": texts[1], "rejected": texts[2]}]
    pairs += [{side: [{"role": "user", "content": texts[3]}, {"role": "assistant", "content": texts[at]}]
               for side, at in (("chosen", 4), ("rejected", 5))}]  # fmt: skip
    files = {
        "pairs": write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, pairs))),
        "documents": write(tmp_path / "documents.jsonl", "\n".join(json.dumps({"text": text}) for text in texts)),
        "lines": write(tmp_path / "lines.txt", "\n".join(texts)),
    }
    for name, file in files.items():
        prune(str(model), str(tmp_path / name), [str(file)], min_count=2, verify=str(file), keep=str(file))
        assert vocabulary(tmp_path / name) == vocabulary(tmp_path / "pairs")
    for name, file in files.items():
        prune(str(model), str(tmp_path / f"{name}-2"), [str(file)], min_count=2)
        assert vocabulary(tmp_path / f"{name}-2") == vocabulary(tmp_path / "pairs-2")
    assert len(vocabulary(tmp_path / "pairs-2")) < len(vocabulary(tmp_path / "pairs"))
    assert vocabulary(tmp_path / "pairs").keys() == set(expected_tokens(model, texts))


def test_verification_finds_lost_merges(model, pruned, tmp_path):
    small = Path(shutil.copytree(pruned, tmp_path / "small"))
    spec = json.loads((small / "tokenizer.json").read_text("utf-8"))
    last = spec["model"]["merges"].pop()
    (small / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    backend = Tokenizer.from_file(str(pruned / "tokenizer.json"))
    text = backend.decode([backend.token_to_id("".join(last))])
    with pytest.raises(FireflyError, match=r"not lossless: .* was .* now "):
        prune(str(model), str(tmp_path / "out"), tokenizer=str(small), verify=str(write(tmp_path / "t.txt", text)))
    assert not (tmp_path / "out").exists()


def test_verification_finds_wrong_rows(model, corpus, tmp_path, monkeypatch):
    finish = CheckpointWriter.finish
    monkeypatch.setattr(CheckpointWriter, "finish", lambda self, rows: finish(self, rows.roll(1)))
    with pytest.raises(FireflyError, match="not lossless: logits differ by"):
        prune(str(model), str(tmp_path / "out"), corpus, verify=corpus[0])
    assert not list(tmp_path.iterdir())


def test_verification_on_nothing_kept_is_no_proof(model, corpus, tmp_path):
    foreign = str(write(tmp_path / "foreign.txt", "".join(reviews()[:1000]).replace("\n", "")))
    with pytest.raises(FireflyError, match="none of its 1 texts is made of kept tokens only"):
        prune(str(model), str(tmp_path / "out"), corpus, min_count=10**6, verify=foreign)


def test_interruption_leaves_nothing(model, corpus, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "write_configs", interrupt)  # after the weights
    with pytest.raises(KeyboardInterrupt):
        prune(str(model), str(tmp_path / "out"), corpus)
    assert not list(tmp_path.iterdir())
