"""The results that training must give: of stock Bloom, one row at a time, and PyTorch's own AdamW in one process."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BloomForCausalLM, get_cosine_schedule_with_warmup

from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.huggingface import load_tokenizer


def labelled(folder: Path, rows_file: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every row of a file, put together here and not by the code under test."""
    tokenizer = load_tokenizer(str(folder))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = []
    for row in read_rows(str(rows_file)):
        ids, labels = [1], [-100]
        for index, (source, target) in enumerate(row.turns):
            given, learned = encode(source) + [2] * (1 if index else 2), [*encode(target), 2]
            ids, labels = ids + given + learned, labels + [-100] * len(given) + learned
        rows.append((ids, labels))
    return rows


def backward(model: BloomForCausalLM, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """Computes loss and gradients of a step from stock logits and a masked cross-entropy, row by row.

    Returns:
        The loss; the gradients are left in the model.
    """
    count = sum(label != -100 for _, labels in rows for label in labels)
    total = 0.0
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        loss = F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total


class Trained:
    """A stock Bloom that is trained on the given rows in each step.

    Args:
        adapt: Gives the model that is trained in its place, such as one of peft; only what is not frozen is trained.

    Attributes:
        model: The trained model.
        losses: Loss of each step.
        norms: Norm of the gradient before clipping, of each step.
    """

    def __init__(
        self, folder: Path, rows_file: Path, steps: Sequence[Sequence[int]], lr, warmup, clip, eps, adapt=None
    ):
        bloom = BloomForCausalLM.from_pretrained(folder).float()
        backward_of = self.learned(bloom.eval(), folder, rows_file)
        self.model = (adapt(bloom) if adapt else bloom).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.losses, self.norms = [], []
        optimizer = torch.optim.AdamW(trained, lr=lr, eps=eps, weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(steps))
        for numbers in steps:
            optimizer.zero_grad()
            self.losses.append(backward_of(self.model, numbers))
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip)))
            optimizer.step()
            schedule.step()

    def learned(self, first: BloomForCausalLM, folder: Path, rows_file: Path) -> Callable:
        """What computes loss and gradients of a step, from the model and the numbers of the step's rows.

        Args:
            first: The model before the first step.
        """
        rows = labelled(folder, rows_file)
        return lambda model, numbers: backward(model, [rows[number] for number in numbers])
