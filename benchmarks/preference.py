"""Compares preference tuning with what a user would run instead: python -m benchmarks.preference --help.

Every system learns the same pairs by DPO, in a process of its own, from the same random Bloom, which is its own
reference. Pairs are made from real rows: a row's target against another's of the same kind. A line gives the tokens a
second, counted as prompt and answer of both rows of a pair for every system, peak memory, and the last step's loss.

    firefly   PreferenceModule and PreferenceDataModule under Lightning's Trainer
    twice     the same, with the prompt of a pair computed for each of its answers
    trl       TRL's DPOTrainer, the log-probabilities of the reference computed before training
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BloomForCausalLM, PreTrainedTokenizerFast

from benchmarks.clock import Clock
from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone
from benchmarks.throughput import draw, make_model, make_parser

# Lightning, this project and TRL are imported where they are used, so that each process has its own libraries only.

SYSTEMS = ("firefly", "twice", "trl")
SPEED, MEMORY = 5, 0.35
"""Goals: how many times the tokens/s of TRL, and which part of its peak memory at most."""

BETA, LEARNING_RATE = 0.1, 3e-5

Pair = dict[str, str]


def main() -> None:
    """Measures each system in a process of its own, in each type of numbers."""
    parser = make_parser(__doc__, ())
    parser.set_defaults(batch_size=8)
    systems = next(action for action in parser._actions if action.dest == "systems")
    systems.choices, systems.default = SYSTEMS, list(SYSTEMS)
    options = parser.parse_args()
    print(json.dumps(machine() | {"threads": options.threads}), flush=True)
    lines = []
    with TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        options.folder = folder
        steps, tokens = alone(planned, options)
        for dtype, system in product(options.dtypes, options.systems):
            lines.append(alone(measure, options, system, dtype, steps, tokens))
            print(json.dumps(lines[-1]), flush=True)
    if options.out:
        draw(options.out, lines)


def planned(options: argparse.Namespace) -> tuple[list[list[Pair]], list[dict[str, int]]]:
    """The pairs of every step, as texts, and how many tokens they have; the cache keeps them for firefly's process."""
    from demo.pairs import write_pairs

    count = (options.warmup + options.steps) * options.batch_size
    write_pairs(options.rows, pairs_file(options), limit=count)
    data = data_module(options)
    pairs = [json.loads(line) for line in pairs_file(options).read_text("utf-8").splitlines()]
    numbers = [data.train[step]["rows"].tolist() for step in range(options.warmup + options.steps)]
    tokens = []
    for step in range(len(numbers)):
        batch = data.train[step]
        whole, shared = sum(batch["lengths"]), sum(map(sum, batch["spans"]))
        tokens.append({"tokens": whole, "computed": shared, "targets": len(batch["target_ids"])})
    return [[pairs[number] for number in step] for step in numbers], tokens


def measure(
    options: argparse.Namespace, system: str, dtype: str, steps: Sequence[Sequence[Pair]], tokens: Sequence[Any]
) -> dict[str, Any]:
    """Trains with one system and returns its line."""
    torch.set_num_threads(options.threads)
    run = (prepare_trl if system == "trl" else prepare_ours)(options, system, dtype, steps)
    clock, before = Clock(options.warmup), peak_gb()
    loss = run(clock)
    peak, seconds = peak_gb(), clock.seconds
    counted = {name: sum(step[name] for step in tokens[options.warmup :]) for name in tokens[0]}
    return {
        "system": system, "dtype": dtype, "hidden": options.hidden, "layers": options.layers,
        "pairs": options.batch_size, "max_length": options.max_length, "steps": options.steps,
        "tokens": counted["tokens"], "tokens_per_second": round(counted["tokens"] / seconds, 1),
        "target_tokens_per_second": round(counted["targets"] / seconds, 1), "peak_rss_gb": peak,
        "libraries_gb": before, "computed_share": round(counted["computed"] / counted["tokens"], 3),
        "loss": round(loss, 4),
    }  # fmt: skip


def prepare_ours(
    options: argparse.Namespace, system: str, dtype: str, steps: Sequence[Sequence[Pair]]
) -> Callable[[Clock], float]:
    """A function that trains as users of this project do, without files, and returns the loss of the last step."""
    import lightning as L

    from benchmarks.ours import Timed
    from firefly_lightning import PreferenceModule

    class Noting(Timed):
        def on_train_batch_end(self, *arguments: Any) -> None:
            self._clock.step_ended()

    def run(clock: Clock, data: Any) -> float:
        trainer = L.Trainer(
            max_steps=len(steps), accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, callbacks=[Noting(clock)],
            precision="bf16-mixed" if dtype == "bf16" else "32-true",
        )  # fmt: skip
        shares = system == "firefly"
        module = PreferenceModule(
            options.folder, beta=BETA, learning_rate=LEARNING_RATE, warmup_steps=0, share_prompts=shares
        )
        trainer.fit(module, data)
        return float(trainer.callback_metrics["train_loss"])

    return partial(run, data=data_module(options))


def data_module(options: argparse.Namespace) -> Any:
    """A data module with the pairs tokenised and their steps planned."""
    from firefly_lightning import PreferenceDataModule

    data = PreferenceDataModule(
        options.folder, train_files=str(pairs_file(options)), batch_size=options.batch_size,
        max_length=options.max_length, cache_dir=str(Path(options.folder) / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data


def pairs_file(options: argparse.Namespace) -> Path:
    """Where the pairs are."""
    return Path(options.folder) / "pairs.jsonl"


def prepare_trl(
    options: argparse.Namespace, system: str, dtype: str, steps: Sequence[Sequence[Pair]]
) -> Callable[[Clock], float]:
    """A function that trains with DPOTrainer on the pairs in the order of the steps."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from benchmarks.peers import hugging_face_arguments, last_loss, timed

    options.system, options.dtype = "trl", dtype
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.folder)
    dataset = Dataset.from_list([as_trl(pair) for step in steps for pair in step])
    usual = hugging_face_arguments(options, len(steps)) | sequential() | {"learning_rate": LEARNING_RATE}

    def run(clock: Clock) -> float:
        model = BloomForCausalLM.from_pretrained(options.folder, torch_dtype=torch.float32)
        config = DPOConfig(
            **usual, beta=BETA, max_length=options.max_length, precompute_ref_log_probs=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = DPOTrainer(
            model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[timed(clock)]
        )
        trainer.train()
        return last_loss(trainer)

    return run


def as_trl(pair: Pair) -> dict[str, str]:
    """A pair in TRL's form, with the control tokens of our format in its texts; TRL adds the end token."""
    return {"prompt": f"<s>{pair['input']}</s></s>", "chosen": pair["chosen"], "rejected": pair["rejected"]}


def sequential() -> dict[str, Any]:
    """Arguments with which a trainer of transformers takes the rows in their order."""
    import inspect

    from transformers import TrainingArguments

    known = inspect.signature(TrainingArguments).parameters
    return (
        {"train_sampling_strategy": "sequential"} if "train_sampling_strategy" in known else {"group_by_length": False}
    )


def compared(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that hold speed and memory against the goals, and say what a shared prompt brings."""
    remarks = []
    for ours in (line for line in lines if line.get("system") == "firefly"):
        here = {line["system"]: line for line in lines if line.get("dtype") == ours["dtype"]}
        if trl := here.get("trl"):
            speed = ours["tokens_per_second"] / trl["tokens_per_second"]
            memory = ours["peak_rss_gb"] / trl["peak_rss_gb"]
            remarks.append(
                f"{ours['dtype']}: {speed:.1f} times the tokens/s of TRL's DPOTrainer (goal {SPEED}) in {memory:.2f} "
                f"of its memory (goal {MEMORY})."
            )
        if twice := here.get("twice"):
            speed = ours["tokens_per_second"] / twice["tokens_per_second"]
            remarks.append(
                f"{ours['dtype']}: computing the prompt of a pair once is {speed:.2f} times as fast as twice, in "
                f"{ours['peak_rss_gb'] / twice['peak_rss_gb']:.2f} of the memory; {ours['computed_share']:.0%} of the "
                "tokens are computed."
            )
    return remarks


if __name__ == "__main__":
    main()
