"""The words of a GGUF: the rules' names, types of tokens, and what is refused because llama.cpp has no such rules."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from firefly_lightning.errors import FireflyError
from firefly_lightning.gguf.words import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_words
from tests.conftest import read_reviews

# As the tokenizer.json of bigscience/bloom, Qwen/Qwen2.5, Qwen/Qwen3.5 and meta-llama/Meta-Llama-3 have them.
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def cut_by(pattern, behavior="isolated"):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), byte_level(use_regex=False)])


def trained(rules, size: int = 400) -> Tokenizer:
    """A tokenizer of real text with given rules, and with a special token and one that is not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = rules, decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(read_reviews(100), trainer)
    tokenizer.add_tokens([AddedToken("<keep>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (byte_level(), "gpt-2"),
        (pre_tokenizers.Sequence([byte_level()]), "gpt-2"),
        (cut_by(BLOOM), "bloom"),
        (cut_by(QWEN2), "qwen2"),
        (cut_by(QWEN35), "qwen35"),
    ],
    ids=["gpt-2", "gpt-2 in a sequence", "bloom", "qwen2", "qwen35"],
)
def test_the_name_of_the_rules_follows_from_them(rules, name):
    tokenizer = trained(rules)
    words = read_words(tokenizer.to_str(), 410, "model")
    assert words.pre == name
    assert not words.normalizes
    assert words.tokens[:401] == [tokenizer.id_to_token(number) for number in range(401)]
    assert words.tokens[401:] == [f"[PAD{number}]" for number in range(401, 410)]
    assert words.types == [CONTROL] * 4 + [NORMAL] * 396 + [USER_DEFINED] + [UNUSED] * 9
    assert words.merges == [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def changed(**fields):
    """The text of a tokenizer of which a field, of its model where it is named so, is another."""
    tokenizer = trained(fields.pop("rules", byte_level()))
    tokenizer.add_tokens([fields.pop("added")] if "added" in fields else [])
    spec = json.loads(tokenizer.to_str())
    for name, value in fields.items():
        part = spec["model"] if name.startswith("model_") else spec
        part[name.removeprefix("model_")] = value
    return json.dumps(spec)


def test_merges_may_be_texts_and_nfc_is_left_to_the_reader():
    spec = json.loads(changed())
    texts = [" ".join(merge) for merge in spec["model"]["merges"]]
    normalizer = json.loads(Tokenizer.from_str(changed()).to_str())["normalizer"]
    assert normalizer is None
    tokenizer = trained(byte_level())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    spec = json.loads(tokenizer.to_str())
    spec["model"]["merges"] = texts
    words = read_words(json.dumps(spec), 401, "model")
    assert words.normalizes
    assert words.merges == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(model_byte_fallback=True), "model: the tokenizer is no byte-level BPE"),
        (changed(model_dropout=0.5), "model: the tokenizer has dropout, which llama.cpp has not"),
        (changed(model_end_of_word_suffix="</w>"), "model: the tokenizer has end_of_word_suffix, which llama.cpp"),
        (
            changed(added=AddedToken("[MASK]", lstrip=True)),
            "model: the tokenizer has lstrip of [MASK], which llama.cpp",
        ),
        (changed(rules=cut_by(r"\w+")), "model: the tokenizer cuts text in a way that llama.cpp has no name for"),
        (changed(rules=cut_by(BLOOM, "removed")), "model: the tokenizer cuts text in a way that llama.cpp has no"),
        (changed(pre_tokenizer=None), "model: the tokenizer cuts text in a way that llama.cpp has no name for"),
        (
            changed(pre_tokenizer=json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())),
            "model: the tokenizer cuts text in a way that llama.cpp has no name for",
        ),
        (
            changed(normalizer=json.loads(normalizers.Lowercase().__getstate__())),
            "model: the tokenizer changes text before it cuts it (Lowercase), which llama.cpp does not",
        ),
    ],
    ids=[
        "no bytes",
        "dropout",
        "ends of words",
        "spaces taken",
        "other pattern",
        "what matches is dropped",
        "no rules",
        "a space before",
        "lowercase",
    ],
)
def test_rules_that_llama_cpp_has_not_are_refused(text, message):
    with pytest.raises(FireflyError) as raised:
        read_words(text, 410, "model")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def unreachable(rules, whole_first: bool) -> str:
    """A tokenizer with a token, 评论, that no merges make."""
    spec = json.loads(trained(rules).to_str())
    ((word, _),) = byte_level(use_regex=False).pre_tokenize_str("鑫鑫")
    spec["model"]["vocab"][word] = 401
    spec["model"]["ignore_merges"] = whole_first
    return json.dumps(spec)


@pytest.mark.parametrize(("pattern", "whole_first"), [(QWEN2, True), (LLAMA3, False)])
def test_tokens_that_no_merges_make_are_refused_where_llama_cpp_reads_them_otherwise(pattern, whole_first):
    with pytest.raises(FireflyError, match=r"the tokenizer reads 鑫鑫 .*; 1 tokens would be read in pieces or as"):
        read_words(unreachable(cut_by(pattern), whole_first), 410, "model")


@pytest.mark.parametrize(("pattern", "whole_first", "name"), [(QWEN2, False, "qwen2"), (LLAMA3, True, "llama-bpe")])
def test_tokens_that_no_merges_make_are_written_where_it_reads_them_so_too(pattern, whole_first, name):
    assert read_words(unreachable(cut_by(pattern), whole_first), 410, "model").pre == name


def test_an_embedding_that_is_too_small_is_refused():
    with pytest.raises(FireflyError, match="has number 400, the embedding only 400 rows"):
        read_words(changed(), 400, "model")
