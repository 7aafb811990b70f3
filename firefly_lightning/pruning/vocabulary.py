"""Which tokens of a byte-level BPE tokenizer are kept, and the smaller tokenizer made of them."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from firefly_lightning.data.sources.any_record import answers_of_pair
from firefly_lightning.data.sources.records import FILE_SUFFIXES, find_sources, is_file
from firefly_lightning.data.sources.row_forms import Record, RowReader, RowRules
from firefly_lightning.data.sources.text_files import format_of
from firefly_lightning.data.sources.text_files import read_lines as read_text_lines
from firefly_lightning.errors import FireflyError, describe_os_error
from firefly_lightning.huggingface import TOKENIZER_CONFIG, load_tokenizer
from firefly_lightning.prompt import SPECIAL_TOKENS, PromptEncoder, check_special_tokens, prompt_format

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""Files beside ``tokenizer_config.json`` that can hold the chat template."""

SIDE_FILES = ("special_tokens_map.json", *TEMPLATE_FILES)
"""Files of a tokenizer that name tokens by their strings, so that they stay as they are when tokens are renumbered."""

OWN_FILES = ("tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt")
"""Files of a tokenizer that number its tokens."""

_BATCH = 1024


def load_bpe_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder, if it is one that can be pruned.

    Raises:
        FireflyError: If there is no tokenizer, or it is unreadable, no byte-level BPE, or lacks Bloom's special tokens.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FireflyError(f"{folder}: has no tokenizer.json; download it, or save the tokenizer as a fast one")
    tokenizer = load_tokenizer(str(folder))
    model = tokenizer.backend_tokenizer.model
    if not isinstance(model, BPE) or model.byte_fallback:
        kind = type(model).__name__
        raise FireflyError(f"{file}: is no byte-level BPE tokenizer ({kind}); use the tokenizer of a Bloom")
    check_special_tokens(tokenizer)
    return tokenizer


def tokenizer_spec(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The content of ``tokenizer.json``, with merges as pairs, and with added tokens that only other files name."""
    # The file is read, not the loaded backend, to which transformers 5 gives a post-processor of its own.
    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    spec: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    merges = spec["model"].get("merges", [])
    spec["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    added = sorted(tokenizer.added_tokens_decoder.items())
    spec["added_tokens"] = [{"id": number, **token.__getstate__()} for number, token in added]
    return spec


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Id of every token of a tokenizer, added tokens included."""
    ids: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    return ids


def read_texts(source: str) -> Iterator[str]:
    """Texts of a source of rows, documents and pairs, or lines of a file of any other suffix; none is empty."""
    form = format_of(source)
    if form == ".txt" or (is_file(source) and form not in FILE_SUFFIXES):
        return read_lines(source)
    rows = RowReader(source, RowRules(read=_texts_of_pair))
    return (text for row in rows for turn in row.turns for text in turn if text)


def _texts_of_pair(fields: Mapping[str, Any], number: int) -> Record | None:
    """The rows of a pair, whose prompt is in the first of them only: it is one text, and counted once."""
    record = answers_of_pair(fields, number)
    if record is None:
        return None
    chosen, rejected = record.rows
    return Record((chosen, rejected._replace(turns=(("", rejected.turns[-1][1]),))), record.unused)


def read_lines(path: str | Path) -> Iterator[str]:
    """Streams the lines of a text file that are not empty.

    Raises:
        FireflyError: If the file cannot be read or a line is not encoded as it should be; with file and line.
    """
    try:
        for _, line in read_text_lines(str(path)):
            if text := line.removesuffix("\n").removesuffix("\r"):
                yield text
    except OSError as error:
        raise FireflyError(describe_os_error(error, path)) from error


def encode_stream(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Streams batches of (texts, their token ids), as training tokenises texts."""
    encoder = PromptEncoder(tokenizer, prompt_format("firefly"))
    stream = iter(texts)
    while batch := list(islice(stream, _BATCH)):
        yield batch, encoder.encode_texts(batch)


def count_tokens(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[str]) -> NDArray[np.int64]:
    """Occurrences of each token id in instruction rows and ``.txt`` lines; ``(highest id + 1,)``.

    Raises:
        FireflyError: If a source cannot be read, or no source holds any text.
    """
    counts = np.zeros(max(token_ids(tokenizer).values()) + 1, np.int64)
    with tqdm(desc="counting tokens", unit=" texts", delay=2) as progress:
        for texts, ids in encode_stream(tokenizer, chain.from_iterable(map(read_texts, find_sources(corpus)))):
            counts += np.bincount(np.fromiter(chain.from_iterable(ids), np.int64), minlength=len(counts))
            progress.update(len(texts))
    if not counts.any():
        raise FireflyError(f"{', '.join(corpus)}: no text to count tokens in; give a corpus that is not empty")
    return counts


def select_tokens(tokenizer: PreTrainedTokenizerFast, used: Iterable[int]) -> list[str]:
    """The tokens to keep, in their new order.

    They are the used tokens, every merge ancestor of them, the byte alphabet and all added tokens. Because
    of the ancestors, the merges that made a text's tokens all stay and stay in order, so the text is merged as before.
    Because of the alphabet, any other text is still written exactly, in smaller pieces.

    Args:
        tokenizer: The large tokenizer.
        used: Ids of the tokens that are used.
    """
    spec, ids = tokenizer_spec(tokenizer), token_ids(tokenizer)
    strings = {number: token for token, number in ids.items()}
    wanted = {strings[number] for number in used} | {token["content"] for token in spec["added_tokens"]}
    kept = _with_ancestors(wanted | (ids.keys() & set(ByteLevel.alphabet())), spec["model"]["merges"])
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    first = dict.fromkeys([*SPECIAL_TOKENS.values(), *special])
    return [*first, *sorted(kept - first.keys(), key=ids.__getitem__)]


def check_ready_made(small: PreTrainedTokenizerFast, known: Mapping[str, int], folder: Path) -> None:
    """Checks that the large tokenizer has every token of the small one.

    Args:
        small: The small tokenizer.
        known: Tokens of the large tokenizer.
        folder: Folder of the large tokenizer, for the message.

    Raises:
        FireflyError: If the large tokenizer lacks tokens, for which there are then no weights; with the first ten.
    """
    ids = token_ids(small)
    missing = sorted(ids.keys() - known.keys(), key=ids.__getitem__)
    if missing:
        named = ", ".join(map(repr, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise FireflyError(
            f"{small.name_or_path}: {len(missing):,} of its tokens are not in {folder} ({named}); "
            "use a tokenizer pruned from that model's"
        )


def write_pruned_tokenizer(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], out: Path) -> None:
    """Writes the tokenizer that has only ``tokens``, numbered in their order, into a folder."""
    ids = {token: number for number, token in enumerate(tokens)}
    text = json.dumps(_pruned_spec(tokenizer_spec(tokenizer), ids), ensure_ascii=False, indent=2)
    (out / "tokenizer.json").write_text(text, encoding="utf-8")
    _copy_side_files(Path(tokenizer.name_or_path), out, ids)


def copy_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Copies a tokenizer's files into a folder; only the class named in ``tokenizer_config.json`` may change."""
    folder = Path(tokenizer.name_or_path)
    for name in OWN_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    _copy_side_files(folder, out, token_ids(tokenizer))


def _with_ancestors(tokens: set[str], merges: Iterable[Sequence[str]]) -> set[str]:
    parents: dict[str, list[str]] = defaultdict(list)
    for left, right in merges:
        parents[left + right] += [left, right]
    kept, pending = set(tokens), list(tokens)
    while pending:
        new = set(parents[pending.pop()]) - kept
        kept |= new
        pending += new
    return kept


def _pruned_spec(spec: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    model = spec["model"]
    # Added tokens are in it too: else `tokenizers` numbers them after the vocabulary, whatever their "id" says.
    model["vocab"] = ids
    model["merges"] = [pair for pair in model["merges"] if pair[0] in ids and pair[1] in ids and "".join(pair) in ids]
    for token in spec["added_tokens"]:
        token["id"] = ids[token["content"]]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    if spec.get("padding"):
        spec["padding"]["pad_id"] = ids[spec["padding"]["pad_token"]]
    _renumber_processor(spec.get("post_processor") or {}, ids)
    return spec


def _renumber_processor(processor: dict[str, Any], ids: dict[str, int]) -> None:
    for part in processor.get("processors", ()):
        _renumber_processor(part, ids)
    special = processor.get("special_tokens", {})  # of TemplateProcessing
    for token in special.values():
        token["ids"] = [ids[string] for string in token["tokens"]]
    for end in ("cls", "sep"):  # of BertProcessing and RobertaProcessing
        if end in processor:
            processor[end] = [processor[end][0], ids[processor[end][0]]]


def _copy_side_files(folder: Path, out: Path, ids: dict[str, int]) -> None:
    for name in SIDE_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "added_tokens_decoder" in config:
        decoder = {str(ids[token["content"]]): token for token in config["added_tokens_decoder"].values()}
        config["added_tokens_decoder"] = dict(sorted(decoder.items(), key=lambda item: int(item[0])))
    config = {**TOKENIZER_CONFIG, **config, "tokenizer_class": TOKENIZER_CONFIG["tokenizer_class"]}
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
