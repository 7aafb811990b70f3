"""Trains as users would without this project, with Trainer or TRL's SFTTrainer, for :mod:`benchmarks.throughput`."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BloomForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from benchmarks.clock import Clock

Rows = Sequence[tuple[Sequence[int], Sequence[bool]]]
"""The tokens of each row, and which of them are learned."""


def prepare(options: argparse.Namespace, steps: Sequence[Rows]) -> Callable[[Clock], float]:
    """A function that trains on the rows of the steps, in their order, and returns the loss of the last step.

    It follows the original recipe (`grouped` puts rows of like length together), joins documents to blocks of one
    length (`joined`), or runs TRL's SFTTrainer on rows that are tokenised already, with masks of their completions.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.folder)
    rows: Rows = [row for step in steps for row in step]
    if options.system == "joined":
        rows = blocks(rows, options.max_length)
        options.batch_size = len(rows) // len(steps)  # as many tokens a step
    inputs = Dataset.from_dict({"input_ids": [ids for ids, _ in rows]})
    usual = hugging_face_arguments(options, len(steps))
    if options.system == "trl":
        from trl import SFTConfig, SFTTrainer

        own = {"max_length": options.max_length, "completion_only_loss": True, "gradient_checkpointing": False}
        masks = [[int(learned) for learned in mask] for _, mask in rows]
        dataset = inputs.add_column("completion_mask", masks)
        make = partial(SFTTrainer, args=SFTConfig(**usual, **own), train_dataset=dataset, processing_class=tokenizer)
    else:
        labels = [[token if learned else -100 for token, learned in zip(*row, strict=True)] for row in rows]
        dataset, collate = inputs.add_column("labels", labels), pad_to_longest(tokenizer.pad_token_id)
        make = partial(Trainer, args=TrainingArguments(**usual), train_dataset=dataset, data_collator=collate)
    return partial(run, options, make)


def blocks(rows: Rows, length: int) -> Rows:
    """The tokens of documents one after another, all learned, in blocks of one length; what is left at the end is not.

    Raises:
        SystemExit: If there are not enough of them.
    """
    stream = [token for ids, _ in rows for token in ids]
    found = [(stream[at : at + length], [True] * length) for at in range(0, len(stream) - length + 1, length)]
    if not found:
        sys.exit(f"{len(stream)} tokens make no block of {length}; give more texts, or a smaller --max_length")
    return found


def run(options: argparse.Namespace, make: Callable[..., Any], clock: Clock) -> float:
    """Makes a trainer for the model and trains; returns the loss of the last step."""
    model = BloomForCausalLM.from_pretrained(options.folder, torch_dtype=torch.float32)
    if options.system == "peft":
        model = with_lora(model)
    count_rows(model, clock)
    trainer = make(model, callbacks=[timed(clock)])
    trainer.train()
    return last_loss(trainer)


def with_lora(model: BloomForCausalLM) -> Any:
    """The model with LoRA of rank 8 on the four linear layers of each block, by peft."""
    from peft import LoraConfig, get_peft_model

    layers = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM"))


def hugging_face_arguments(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Arguments that both trainers take."""
    grouped = options.system in ("grouped", "trl")
    order: dict[str, Any] = {"train_sampling_strategy": "group_by_length" if grouped else "sequential"}
    if "train_sampling_strategy" not in inspect.signature(TrainingArguments).parameters:  # transformers 4
        order = {"group_by_length": grouped}
    return {
        "output_dir": str(Path(options.folder) / "out"), "per_device_train_batch_size": options.batch_size,
        "max_steps": steps, "learning_rate": 3e-5, "lr_scheduler_type": "cosine", "use_cpu": options.device == "cpu",
        "bf16": options.dtype == "bf16", "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, **order,
    }  # fmt: skip


def timed(clock: Clock) -> TrainerCallback:
    """A callback that tells the clock of every step."""

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            clock.step_ended()

    return Timed()


def count_rows(model: BloomForCausalLM, clock: Clock) -> None:
    """Has every forward pass of the model tell the clock its tokens and learned tokens."""

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        clock.counts.append((int(kwargs["attention_mask"].sum()), int((kwargs["labels"] != -100).sum())))

    model.register_forward_pre_hook(count, with_kwargs=True)


def pad_to_longest(pad_id: int) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """The collator of the original project, which pads rows to the longest of the batch."""

    def collate(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

        ids, labels = padded("input_ids", pad_id), padded("labels", -100)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def last_loss(trainer: Any) -> float:
    """The loss of the last step that the trainer logged."""
    return float(next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry))
