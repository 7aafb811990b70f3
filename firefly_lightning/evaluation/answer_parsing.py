"""What can be read off an answer in the forms of the templates: labels, entities, corrections, final answers."""

import re
from itertools import groupby

from rapidfuzz.distance import LCSseq, Levenshtein

Entity = tuple[str, str]
"""Name and type of an entity; the type is empty where the question asks for one type only."""

Edit = tuple[int, str, str]
"""An edit: its position in the sentence to correct, what is done there, and the characters that are put in."""

_ENTITY = re.compile(r"(.+?)[（(](.+?)[）)]$")
_LABELLED = re.compile(r"([^\s：:、，,（(]{1,6})[：:](.*)")
_NO_ENTITY = re.compile(r"不存在实体|无|(文中|文章中?|文本中?|句中|这段话中?)?没有.*")
_NO_MISTAKE = re.compile(r"(这句话|句子)?(没有错别字|没有错误|没有错|用字正确|正确)")
_FINAL_ANSWER = re.compile(r".*答案(?:是|为)[^\S\n]*[：:]?[^\S\n]*([^\s：:].*)")


def label(text: str) -> str:
    """An answer that is a label, without the white space around it and the full stop at its end."""
    return text.strip().rstrip("。.!！").strip()


def final_answer(text: str) -> str | None:
    """What follows the last ``答案是：`` or ``答案为：`` on its line; None where there is neither."""
    found = _FINAL_ANSWER.findall(text)
    return label(found[-1]) if found else None


def entities(text: str) -> set[Entity]:
    """Entities that an answer names: ``名称（类型）、…``, a line ``类型：名称、…`` for each type, or names alone."""
    found: set[Entity] = set()
    for line in map(label, text.splitlines()):
        labelled = _LABELLED.fullmatch(line)
        kind, listed = labelled.groups() if labelled else ("", line)
        if _NO_ENTITY.fullmatch(label(listed)):
            continue
        for item in filter(None, map(label, re.split("[、，,；;]", listed))):
            typed = _ENTITY.match(item)
            found.add((typed[1], typed[2]) if typed and not kind else (item, kind))
    return found


def corrections(question: str, *answers: str) -> list[set[Edit]]:
    """Character edits that lead from the sentence in a question to the corrected one in each answer.

    Question and answers hold more than the sentence (``有错别字，应改为：…``). The sentence is the span between line
    breaks and colons of the question that is most like such a span of the first answer; if the first answer finds no
    mistake, it is what follows the request. Each answer is read as its span that is most like the sentence. An answer
    that finds no mistake has no edits.

    Args:
        question: The input of a row of ``TextCorrection``.
        answers: The row's target, which shows where the sentence is, and then the other answers.
    """
    corrected = [None if _NO_MISTAKE.fullmatch(label(answer)) else _spans(answer) for answer in answers]
    if corrected[0] is None:  # the target does not repeat the sentence, which is what follows the request
        sentence = re.split("\n|：", question, maxsplit=1)[-1].strip()
    else:
        _, sentence, _ = max((_likeness(one, other), one, other) for one in _spans(question) for other in corrected[0])
    return [set() if spans is None else _edits(sentence, _most_like(sentence, spans)) for spans in corrected]


def _spans(text: str) -> list[str]:
    """All spans that begin with the text, with a line or after a colon, and end where a line ends."""
    starts = [0, *(found.end() for found in re.finditer("[\n：:]", text))]
    ends = [*(found.start() for found in re.finditer("\n", text)), len(text)]
    return [text[start:end].strip() for start in starts for end in ends if start <= end]


def _most_like(sentence: str, spans: list[str]) -> str:
    return max(spans, key=lambda span: _likeness(sentence, span))


def _likeness(one: str, other: str) -> int:
    """Characters in common minus those to be changed, so that a long pair with a mistake beats a short one without."""
    return int(LCSseq.similarity(one, other) - Levenshtein.distance(one, other))


def _edits(sentence: str, corrected: str) -> set[Edit]:
    """The edits of a Levenshtein alignment, one for each character; what is put in at one place is one edit."""
    edits: set[Edit] = set()
    for (tag, at), group in groupby(Levenshtein.editops(sentence, corrected), lambda edit: (edit.tag, edit.src_pos)):
        edits.add((at, tag, "" if tag == "delete" else "".join(corrected[edit.dest_pos] for edit in group)))
    return edits
