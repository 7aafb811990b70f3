"""Tokens a second beside what a user would run instead: python -m benchmarks.throughput --help.

Every system trains the same random Bloom on the same rows, in a process of its own, and prints a JSON line: real tokens
(no padding) a second, learned tokens a second, peak memory, the loss of the last step, and which share of the time the
bare matrix products of the same steps take, measured in the same process right afterwards. The first steps are not
counted.

    firefly   FireflyModule and FireflyDataModule under Lightning's Trainer
    frugal    the same, with glibc told by MALLOC_MMAP_THRESHOLD_ to give memory back as it is freed
    trainer   the original recipe: transformers.Trainer, rows padded to the longest, logits at every position
    grouped   the same with rows of like length in a batch
    trl       TRL's SFTTrainer, completions only, rows of like length in a batch
"""

import argparse
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import BloomConfig, BloomForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.floor import DTYPES, matrix_products
from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone
from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.huggingface import load_tokenizer

OURS = ("firefly", "frugal")
SYSTEMS = (*OURS, "trainer", "grouped", "trl")
ENVIRONMENTS = {"frugal": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}
"""Variables of a system's process."""
PURPOSES = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("adamw", "Optimizer."),
    "loss but for its products": ("log_softmax", "exp_", "gather", "scatter"),
    "gelu": ("gelu",),
    "layer norm": ("layer_norm",),
}
"""Of operations, by a part of their names."""
BLUE, GREY = "#4C78A8", "#BAB0AC"


def main() -> None:
    """Measures each system in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, help="by default one for 64 of the width")
    parser.add_argument("--vocabulary", type=int, help="tokens; what the tokenizer lacks is made up")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="that are counted")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--attention", default="auto", help="of firefly")
    parser.add_argument("--profile", type=Path, help="folder for where the time of firefly's operations goes")
    parser.add_argument("--out", type=Path, help="PNG of the figures")
    options = parser.parse_args()
    print(json.dumps(machine() | {"threads": options.threads}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        options.folder = folder
        data_module(options).prepare_data()  # else the first process would tokenise, and hold memory of it
        lines = []
        for dtype, system in product(options.dtypes, options.systems):
            with mock.patch.dict(os.environ, ENVIRONMENTS.get(system, {})):
                lines.append(alone(measure, options, system, dtype))
            print(json.dumps(lines[-1]), flush=True)
        options.steps, options.warmup = 2, 1
        for dtype in options.dtypes if options.profile else ():
            line = alone(measure, options, "firefly", dtype, options.profile / f"profile-{dtype}.txt")
            print(json.dumps({"profiled": dtype} | line["shares_of_time"]), flush=True)
    if options.out:
        draw(options.out, lines)


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Bars of speed and memory."""
    figure = Figure(figsize=(10, 1.5 + 0.4 * len(lines)), layout="constrained")
    names = [f"{line['system']}, {line['dtype']}" for line in lines]
    parts = (("tokens_per_second", "tokens/s"), ("peak_rss_gb", "peak memory, GB"))
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), parts, strict=True):
        values = [line[key] for line in lines]
        axes.bar_label(
            axes.barh(names, values, color=[BLUE if name.startswith(OURS) else GREY for name in names]), padding=3
        )
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """A random Bloom with its tokenizer, the same for all."""
    tokenizer = load_tokenizer(options.tokenizer)
    tokens = len(tokenizer)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(tokens, options.vocabulary or tokens)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, n_layer=options.layers,
        n_head=options.heads or options.hidden // 64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BloomForCausalLM(config).save_pretrained(folder)


def data_module(options: argparse.Namespace) -> FireflyDataModule:
    """The rows, the same for all."""
    return FireflyDataModule(
        options.folder, train_files=options.rows, batch_size=options.batch_size, max_length=options.max_length
    )


def measure(options: argparse.Namespace, system: str, dtype: str, profile_to: Path | None = None) -> dict[str, Any]:
    """One system's figures."""
    options.system, options.dtype = system, dtype
    torch.set_num_threads(options.threads)
    data = data_module(options)
    data.prepare_data()
    data.setup("fit")
    steps = options.warmup + options.steps
    batches = [data.train[step] for step in range(steps)]
    clock, before = Clock(options.warmup), peak_gb()
    run = {**dict.fromkeys(OURS, run_firefly), "trl": run_trl}.get(options.system, run_trainer)
    with torch.profiler.profile() if profile_to else nullcontext() as profiler:
        loss = run(options, data, batches, clock)
    peak, seconds = peak_gb(), clock.seconds
    counted = clock.counts[options.warmup :]
    tokens, targets = (sum(counts) for counts in zip(*counted, strict=True))
    config = BloomConfig.from_pretrained(options.folder)
    with torch.device("meta"):
        parameters = BloomForCausalLM(config).num_parameters()
    vocabulary = config.vocab_size
    sizes = options.hidden, options.layers, vocabulary, options.dtype
    floor = sum(matrix_products(*counts, *sizes) for counts in counted)
    return {
        "system": options.system, "dtype": options.dtype, "hidden": options.hidden, "layers": options.layers,
        "vocabulary": vocabulary, "batch_size": options.batch_size, "max_length": options.max_length,
        "steps": options.steps, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1),
        "target_tokens_per_second": round(targets / seconds, 1), "peak_rss_gb": peak,
        "libraries_gb": before, "state_gb": round(16 * parameters / 1e9, 2),
        "share_of_floor": round(floor / seconds, 3), "loss": round(loss, 4),
        **({"shares_of_time": profiled(profiler, profile_to)} if profiler and profile_to else {}),
    }  # fmt: skip


def profiled(profiler: torch.profiler.profile, path: Path) -> dict[str, float]:
    """Writes the table of operations; gives the shares of their time by what they are for."""
    operations = profiler.key_averages()
    table = operations.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
    path.write_text(table, "utf-8")
    total = sum(operation.self_cpu_time_total for operation in operations)
    shares = dict.fromkeys((*PURPOSES, "all else"), 0.0)
    for operation in operations:
        purpose = next((name for name, words in PURPOSES.items() if any(w in operation.key for w in words)), "all else")
        shares[purpose] += operation.self_cpu_time_total / total
    return {purpose: round(share, 3) for purpose, share in shares.items()}


class Clock:
    """Seconds of the steps after the first few.

    Args:
        warmup: Steps that do not count.

    Attributes:
        counts: Of every step, its tokens without padding and those of them that are learned.
    """

    def __init__(self, warmup: int) -> None:
        self._warmup, self._steps = warmup, 0
        self.counts: list[tuple[int, int]] = []
        self._began = self._ended = 0.0

    def step_ended(self) -> None:
        """To be called after every optimizer step."""
        self._steps += 1
        self._ended = time.perf_counter()
        if self._steps == self._warmup:
            self._began = self._ended

    @property
    def seconds(self) -> float:
        """From the end of the last step that does not count to the end of the last."""
        return self._ended - self._began


def run_firefly(options: argparse.Namespace, data: FireflyDataModule, batches: Sequence[Any], clock: Clock) -> float:
    """As its users run it, but for logging to files."""

    class Timed(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            batch = arguments[3]
            clock.counts.append((sum(batch["lengths"]), len(batch["target_ids"])))
            clock.step_ended()

    trainer = L.Trainer(
        max_steps=len(batches), accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[Timed()],
        precision="bf16-mixed" if options.dtype == "bf16" else "32-true",
    )  # fmt: skip
    module = FireflyModule(options.folder, warmup_steps=0, attention=options.attention)
    trainer.fit(module, data)
    return float(trainer.callback_metrics["train_loss"])


def run_trainer(options: argparse.Namespace, data: FireflyDataModule, batches: Sequence[Any], clock: Clock) -> float:
    """The original recipe; `grouped` puts rows of like length together."""
    arguments = TrainingArguments(**hugging_face_arguments(options, len(batches)))
    model = BloomForCausalLM.from_pretrained(options.folder)
    count_rows(model, clock)
    trainer = Trainer(
        model, arguments, train_dataset=as_dataset(batches, data), callbacks=[timed(clock)],
        data_collator=pad_to_longest(data.tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.train()
    return last_loss(trainer)


def run_trl(options: argparse.Namespace, data: FireflyDataModule, batches: Sequence[Any], clock: Clock) -> float:
    """SFTTrainer on rows that are tokenised already, with masks of their completions."""
    from trl import SFTConfig, SFTTrainer

    own = {"max_length": options.max_length, "completion_only_loss": True, "gradient_checkpointing": False}
    arguments = SFTConfig(**hugging_face_arguments(options, len(batches)), **own)
    rows = as_dataset(batches, data)
    masks = [[int(label != -100) for label in labels] for labels in rows["labels"]]
    rows = rows.remove_columns("labels").add_column("completion_mask", masks)
    model = BloomForCausalLM.from_pretrained(options.folder)
    count_rows(model, clock)
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=data.tokenizer, callbacks=[timed(clock)]
    )
    trainer.train()
    return last_loss(trainer)


def hugging_face_arguments(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Of both trainers."""
    grouped = options.system in ("grouped", "trl")
    order: dict[str, Any] = {"train_sampling_strategy": "group_by_length" if grouped else "sequential"}
    if "train_sampling_strategy" not in inspect.signature(TrainingArguments).parameters:  # transformers 4
        order = {"group_by_length": grouped}
    return {
        "output_dir": str(Path(options.folder) / "out"), "per_device_train_batch_size": options.batch_size,
        "max_steps": steps, "learning_rate": 3e-5, "lr_scheduler_type": "cosine", "use_cpu": True,
        "bf16": options.dtype == "bf16", "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, **order,
    }  # fmt: skip


def timed(clock: Clock) -> TrainerCallback:
    """Tells the clock of every step."""

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            clock.step_ended()

    return Timed()


def count_rows(model: BloomForCausalLM, clock: Clock) -> None:
    """Has every forward pass tell the clock what it is given."""

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        clock.counts.append((int(kwargs["attention_mask"].sum()), int((kwargs["labels"] != -100).sum())))

    model.register_forward_pre_hook(count, with_kwargs=True)


def as_dataset(batches: Sequence[Any], data: FireflyDataModule) -> Dataset:
    """The rows of the steps, in their order, as ids and labels."""
    rows = [data.train.rows[int(row)] for batch in batches for row in batch["rows"]]
    ids = [row.input_ids.tolist() for row in rows]
    labels = [[token if learned else -100 for token, learned in zip(*row, strict=True)] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": [[int(label) for label in one] for one in labels]})


def pad_to_longest(pad_id: int) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """The original project's collator."""

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
    """Of the last step that was logged."""
    return float(next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry))


if __name__ == "__main__":
    main()
