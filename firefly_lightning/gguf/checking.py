"""Proof on real texts that a GGUF is read in the same tokens as its model, by the rules that stand in the file."""

from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from firefly_lightning.errors import FireflyError, shown
from firefly_lightning.gguf.words import PATTERNS, USER_DEFINED, WHOLE_FIRST

_BATCH = 1000


def check_texts(file: Path, tokenizer: Tokenizer, texts: Iterable[str], where: str) -> tuple[int, int]:
    """Compares the tokens of texts, special tokens typed in them read as text.

    Args:
        file: The GGUF.
        tokenizer: The model's own tokenizer.
        texts: The texts.
        where: What they are read from, which opens messages.

    Returns:
        Number of texts, and of their tokens.

    Raises:
        FireflyError: If a text has other tokens, or there is none.
    """
    of_file = tokenizer_of(file)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    count = tokens = 0
    for batch in _batches(texts):
        own, read = (one.encode_batch_fast(batch, add_special_tokens=False) for one in (tokenizer, of_file))
        for text, expected, found in zip(batch, own, read, strict=True):
            if expected.ids != found.ids:
                at = next(i for i, pair in enumerate(zip_longest(expected.ids, found.ids)) if pair[0] != pair[1])
                others, wanted = (ids[at : at + 4] for ids in (found.ids, expected.ids))
                raise FireflyError(
                    f"{where}: the GGUF reads {shown(text)} in other tokens than the model, {others} where that has "
                    f"{wanted}; the tokenizer has a rule that llama.cpp has not"
                )
            count, tokens = count + 1, tokens + len(expected.ids)
    if not count:
        raise FireflyError(f"{where}: has no text to verify with; give a file with a text a line")
    return count, tokens


def tokenizer_of(file: Path) -> Tokenizer:
    """A tokenizer that does what llama.cpp does with the words of a GGUF, typed special tokens read as text.

    Raises:
        FireflyError: If the rules of the file are none of those that are written here.
    """
    import gguf

    fields = gguf.GGUFReader(file).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    pre = value("pre")
    if pre not in PATTERNS:
        raise FireflyError(f"{file}: has the rules {pre}; those of {', '.join(PATTERNS)} are known here")
    tokens = {token: number for number, token in enumerate(value("tokens"))}
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(tokens, merges, ignore_merges=pre in WHOLE_FIRST))
    cut = pre_tokenizers.Split(Regex(PATTERNS[pre][-1]), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
    added = [token for token, kind in zip(tokens, value("token_type"), strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    read = iter(texts)
    while batch := list(islice(read, _BATCH)):
        yield batch
