"""Proof on real texts that a pruned Bloom does what the large one did."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import load_bloom
from firefly_lightning.prompt import PromptEncoder, prompt_format
from firefly_lightning.pruning.vocabulary import encode_stream, load_bpe_tokenizer, read_texts

TOLERANCE = 1e-5
"""Largest difference of logits allowed, relative to the largest logit; rounding in float32 stays ten times below it."""

_SAMPLES, _SAMPLE_TOKENS = 8, 64


class Verification(NamedTuple):
    """What was compared between the large and the pruned model, and what came of it.

    Attributes:
        same_tokens: Number of texts of kept tokens only, each with the same token strings as before.
        dropped_tokens: Number of texts with a dropped token; written in other tokens, they still read the same.
        logits_texts: Number of texts on which logits were compared.
        logits_difference: The largest difference of logits, relative to the largest logit.
    """

    same_tokens: int
    dropped_tokens: int
    logits_texts: int
    logits_difference: float

    def summary(self) -> str:
        """The result in one line for people."""
        return (
            f"Verified: {self.same_tokens:,} texts in the same tokens as before; {self.dropped_tokens:,} with dropped "
            f"tokens, which still read the same; logits of {self.logits_texts} texts the same within "
            f"{self.logits_difference:.1e} of the largest"
        )


class _Sample(NamedTuple):
    before: list[int]
    after: list[int]


def verify_pruning(large: PreTrainedTokenizerFast, pruned: Path, rows: Tensor, texts: str) -> Verification:
    """Compares token strings on every text, and logits in float32 on the first few texts. Loads both models, in turn.

    Args:
        large: Tokenizer of the large model's folder.
        pruned: Folder of the pruned model.
        rows: Row of the large vocabulary for each row of the new one; ``(vocabulary,)``.
        texts: Instruction rows, or a UTF-8 file with one text a line.

    Raises:
        FireflyError: If something differs, or no text is made of kept tokens only.
    """
    small = load_bpe_tokenizer(pruned)
    encoder = PromptEncoder(small, prompt_format("firefly"))
    kept = set(rows.tolist())
    samples: list[_Sample] = []
    same = dropped = 0
    for batch, large_ids in encode_stream(large, read_texts(texts)):
        for text, before, after in zip(batch, large_ids, encoder.encode_texts(batch), strict=True):
            if kept.issuperset(before):
                _check_tokens(text, large.convert_ids_to_tokens(before), small.convert_ids_to_tokens(after))
                samples += [_Sample(before[:_SAMPLE_TOKENS], after[:_SAMPLE_TOKENS])][: _SAMPLES - len(samples)]
                same += 1
            else:
                _check_decoding(text, large, before, "before")
                _check_decoding(text, small, after, "now")
                dropped += 1
    if not same:
        raise FireflyError(
            f"{texts}: none of its {dropped} texts is made of kept tokens only; choose texts like the corpus"
        )
    return Verification(same, dropped, len(samples), _compare_logits(large, pruned, rows, samples))


def _check_tokens(text: str, before: list[str], after: list[str]) -> None:
    if before != after:
        raise FireflyError(f"not lossless: {_quoted(text)} was {' '.join(before[:20])}, now {' '.join(after[:20])}")


def _check_decoding(text: str, tokenizer: PreTrainedTokenizerFast, ids: list[int], when: str) -> None:
    read = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    if read != text:
        raise FireflyError(f"not lossless: {_quoted(text)} written in tokens reads {_quoted(read)} {when}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _compare_logits(large: PreTrainedTokenizerFast, pruned: Path, rows: Tensor, samples: Sequence[_Sample]) -> float:
    old = _logits(large.name_or_path, [sample.before for sample in samples], rows)
    new = _logits(str(pruned), [sample.after for sample in samples], torch.arange(len(rows)))
    largest = max(float(logits.abs().max()) for logits in old)
    difference = max(float((a - b).abs().max()) for a, b in zip(old, new, strict=True)) / largest
    if not difference <= TOLERANCE:  # written so that NaN fails too
        raise FireflyError(f"not lossless: logits differ by {difference:.2g} of the largest, allowed is {TOLERANCE:g}")
    return difference


@torch.inference_mode()
def _logits(folder: str, inputs: Sequence[list[int]], columns: Tensor) -> list[Tensor]:
    model = load_bloom(folder, torch.float32).eval()
    return [model(torch.tensor([ids])).logits[0, :, columns] for ids in inputs]
