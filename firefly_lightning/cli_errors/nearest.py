"""The known key, class or other name that someone may have meant who typed another one."""

import difflib
from collections.abc import Iterable, Sequence

OTHERS = {
    # Names of the same things in Hugging Face's Trainer, in older Lightning and in the original scripts.
    "bf16": "trainer.precision",
    "devices": "trainer.devices",
    "epochs": "trainer.max_epochs",
    "fp16": "trainer.precision",
    "gpus": "trainer.devices",
    "gradient_accumulation_steps": "data.micro_batch_size",
    "lr": "model.learning_rate",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.path",
    "num_train_epochs": "trainer.max_epochs",
    "output_dir": "trainer.default_root_dir",
    "per_device_train_batch_size": "data.micro_batch_size",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "save_steps": "checkpoint.every_n_steps",
    "seed": "seed_everything",
    "train_file": "data.train_files",
}
"""For keys of other programs, the key of ``firefly-fit`` that sets the same."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Known keys that someone may have meant who typed another one: the same word elsewhere, or one like it.

    Args:
        name: The key that was typed, with dots between its parts.
        known: The keys that there are.
    """
    keys, name = sorted(known), name.replace("-", "_")
    tail = name.rpartition(".")[2].lower()
    if same := [key for key in keys if key.rpartition(".")[2].lower() == tail]:
        alike = [key for key in same if "." in name and _ratio(key.partition(".")[0], name.partition(".")[0]) > 0.5]
        return (alike or same)[:3]
    if (other := OTHERS.get(tail)) in keys:
        return [str(other)]
    groups = sorted({key.partition(".")[0] for key in keys})
    first, dot, rest = name.partition(".")
    if not dot:
        tails = {key.rpartition(".")[2]: key for key in keys}
        return [near if near in groups else tails[near] for near in alike_names(name, [*groups, *tails])]
    for group in [first] if first in groups else alike_names(first, groups, cutoff=0.5):
        own = [key for key in keys if key.startswith(f"{group}.")]
        return alike_names(f"{group}.{rest}", own, cutoff=0.5) or [group]
    return []


def alike_names(name: str, known: Sequence[str], cutoff: float = 0.6) -> list[str]:
    """The name that is most like a given one, or the two that are equally so; whatever their capitals."""
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), list(lower), 2, cutoff)
    equal = len(near) == 2 and _ratio(name.lower(), near[0]) - _ratio(name.lower(), near[1]) < 0.01
    return [lower[one] for one in (sorted(near) if equal else near[:1])]


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()
