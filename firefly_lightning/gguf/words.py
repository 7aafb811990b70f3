"""The words of a GGUF: tokens, their types and merges, and the name of the rules by which text is cut before merging.

llama.cpp knows those rules by names, each a regular expression in its source (``src/llama-vocab.cpp``). Its converter
finds the name by a hash of what the tokenizer makes of a test text, and refuses what nobody has listed. Here the name
follows from the rules of the tokenizer itself, and rules that have none are refused.
"""

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteLevel

from firefly_lightning.errors import FireflyError, shown, some

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens (``enum llama_token_type``): of text, special, added but no special one, and rows without a token."""

_SHORTENED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENGLISH = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

OF_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ``ByteLevel`` cuts by where it is alone, as GPT-2 does."""

PATTERNS = {
    "gpt-2": (OF_BYTE_LEVEL,),
    "bloom": (r" ?[^(\s|[.,!?…。，、।۔،])]+", r" ?[^(\s|.,!?…。，、।۔،)]+"),
    "qwen2": (rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+{_REST}",),
    "qwen35": (rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+{_REST}",),
    "llama-bpe": (rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{_REST}",),
}
"""For each name that llama.cpp knows, the regular expressions of tokenizers that cut as it does."""

WHOLE_FIRST = {"llama-bpe"}
"""Names with which llama.cpp takes a piece of text that is a token without merging it (``ignore_merges``)."""


@dataclass(frozen=True)
class Words:
    """What a GGUF says of its tokenizer.

    Attributes:
        tokens: The tokens in the order of their numbers, in the letters that stand for bytes.
        types: The type of each token.
        merges: Pairs of tokens that are merged, the first ones first, with a space between them.
        pre: llama.cpp's name of the rules by which text is cut before merging.
        normalizes: Whether the tokenizer puts text into Unicode's form NFC first, which llama.cpp does not.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    normalizes: bool


def read_words(tokenizer_json: str, rows: int, where: str) -> Words:
    """The words of a tokenizer.

    Args:
        tokenizer_json: Text of ``tokenizer.json``.
        rows: Rows of the model's embedding; those without a token become tokens that are never used.
        where: Name of the model, which opens messages.

    Raises:
        FireflyError: If llama.cpp has no rules that do the same.
    """
    fields = json.loads(tokenizer_json)
    model = fields["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise FireflyError(f"{where}: the tokenizer is no byte-level BPE; only such a one can be written as GGUF")
    _check_merging(fields, where)
    pre = _name_of_rules(fields, where)
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(first, second) for first, second in pairs]
    added = {token["content"]: CONTROL if token.get("special") else USER_DEFINED for token in fields["added_tokens"]}
    _check_reachable(model["vocab"], added.keys(), merges, bool(model.get("ignore_merges")), pre, where)
    numbers = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for token, number in numbers.items():
        if number >= rows:
            raise FireflyError(f"{where}: token {shown(token)} has number {number}, the embedding only {rows} rows")
        tokens[number], types[number] = token, added.get(token, NORMAL)
    return Words(tokens, types, [" ".join(merge) for merge in merges], pre, _normalizes(fields, where))


def _check_merging(fields: Mapping[str, Any], where: str) -> None:
    """Refuses what llama.cpp has nothing for in merging, and in finding tokens that were added.

    Raises:
        FireflyError: If there is such a thing.
    """
    model = fields["model"]
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]
    flags = ("lstrip", "rstrip", "single_word")
    odd += [f"{flag} of {token['content']}" for token in fields["added_tokens"] for flag in flags if token.get(flag)]
    if odd:
        raise FireflyError(
            f"{where}: the tokenizer has {some(odd)}, which llama.cpp has not; take that out of tokenizer.json if "
            "the model was trained without it"
        )


def _name_of_rules(fields: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of the rules by which a tokenizer cuts text before merging.

    Raises:
        FireflyError: If it has none.
    """
    parts = list(_flat(fields.get("pre_tokenizer"), "pretokenizers"))
    last = parts[-1] if parts else {}
    pattern = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(parts) == 1 and last.get("use_regex", True):
            pattern = OF_BYTE_LEVEL
        elif len(parts) == 2 and not last.get("use_regex", True):
            pattern = _pattern_of(parts[0])
    for name, patterns in PATTERNS.items():
        if pattern is not None and pattern.replace(_SHORTENED, _ENGLISH) in patterns:
            return name
    what = f"its rules are {shown(json.dumps(fields.get('pre_tokenizer'), ensure_ascii=False))}"
    raise FireflyError(
        f"{where}: the tokenizer cuts text in a way that llama.cpp has no name for; {what}; those of "
        f"{', '.join(PATTERNS)} can be written"
    )


def _pattern_of(part: Mapping[str, Any]) -> str | None:
    """The regular expression whose matches are cut out of a text; None where a rule does something else."""
    if part.get("type") != "Split" or part.get("behavior") != "Isolated" or part.get("invert"):
        return None
    pattern = part["pattern"].get("Regex")
    return pattern if isinstance(pattern, str) else None


def _flat(rule: Any, key: str) -> Iterator[dict[str, Any]]:
    """The rules in a sequence of rules, or in one in it."""
    if isinstance(rule, dict) and rule.get("type") == "Sequence":
        for part in rule[key]:
            yield from _flat(part, key)
    elif isinstance(rule, dict):
        yield rule


def _normalizes(fields: Mapping[str, Any], where: str) -> bool:
    kinds = {rule["type"] for rule in _flat(fields.get("normalizer"), "normalizers")}
    if kinds - {"NFC"}:
        raise FireflyError(f"{where}: the tokenizer changes text before it cuts it ({some(sorted(kinds))}), which "
                           "llama.cpp does not; only NFC can be left to the reader of the file")  # fmt: skip
    return bool(kinds)


def _check_reachable(
    vocab: Mapping[str, int],
    added: Set[str],
    merges: list[tuple[str, str]],
    whole_first: bool,
    pre: str,
    where: str,
) -> None:
    """Checks that llama.cpp finds the tokens that a tokenizer finds without merging, or merges as it does.

    Raises:
        FireflyError: If a token is made by no merges, and only one of both takes it as it is.
    """
    if whole_first == (pre in WHOLE_FIRST):
        return
    merged = models.BPE(dict(vocab), merges)
    texts = vocab.keys() - added
    if lost := sorted(token for token in texts if [part.value for part in merged.tokenize(token)] != [token]):
        one = shown(ByteLevel().decode([lost[0]]))
        how = "without merging (ignore_merges)" if whole_first else "by its merges alone"
        raise FireflyError(
            f"{where}: the tokenizer reads {one} {how}, and llama.cpp does not with the rules of {pre}; {len(lost):,} "
            "tokens would be read in pieces or as a whole where the tokenizer does not"
        )
