"""Runs the benchmarks and writes RESULTS.md: python -m benchmarks.results --help.

The JSON lines of each script are kept in ``results/NAME.jsonl`` and its figure in ``results/NAME.png``. RESULTS.md is
made from these files alone, so that ``--only`` can run a single script again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import (
    answers,
    before_after,
    clean,
    clean_large,
    full_size,
    lora,
    micro_batches,
    preference,
    pretrain,
    saves,
    survive,
    validation,
)

Lines = Sequence[dict[str, Any]]

GOALS = {"trainer": 4, "grouped": 4, "trl": 6}
"""How many times as fast as each other system firefly should be."""

FLOORS = {"fp32": 0.82, "bf16": 0.7}
"""Share of the time of firefly's steps that bare matrix products should take."""


class Part(NamedTuple):
    """One script and how its lines are shown.

    Attributes:
        title: Title of the section.
        text: What the figures of the section mean.
        arguments: Arguments of the script, beyond those that all scripts get.
        columns: Keys of the lines to show as columns; only lines with the first key are shown.
        remarks: Makes sentences from the lines, to write below their table.
    """

    title: str
    text: str
    arguments: Sequence[str]
    columns: Sequence[str]
    remarks: Callable[[Lines], list[str]]


def compared(lines: Lines) -> list[str]:
    """Sentences that compare firefly's speed and memory with other systems and with the goals, by type of numbers."""
    remarks = []
    systems = [line for line in lines if "system" in line]
    for ours in (line for line in systems if line["system"] not in GOALS):
        for other in (line for line in systems if line["system"] in GOALS and line["dtype"] == ours["dtype"]):
            name = other["system"]
            speed = ours["tokens_per_second"] / other["tokens_per_second"]
            memory = ours["peak_rss_gb"] / other["peak_rss_gb"]
            remarks.append(
                f"{ours['system']}, {ours['dtype']}: {speed:.1f} times the tokens/s of {name} (goal {GOALS[name]}), "
                f"{memory:.2f} of its memory (goal 0.3), "
                f"{activations(ours) / activations(other):.2f} of what is not fixed."
            )
    for frugal in (line for line in systems if line["system"] == "frugal"):
        ours = next(line for line in systems if line["system"] == "firefly" and line["dtype"] == frugal["dtype"])
        kept = ours["peak_rss_gb"] - frugal["peak_rss_gb"]
        slower = 1 - frugal["tokens_per_second"] / ours["tokens_per_second"]
        remarks.append(
            f"{ours['dtype']}: of firefly's {ours['peak_rss_gb']} GB, {ours['libraries_gb'] + ours['state_gb']:.2f} "
            f"are fixed, and {kept:.2f} freed memory that glibc keeps; not to keep it takes {slower:.0%} of the speed."
        )
    for line in (line for line in systems if line["system"] == "firefly"):
        remarks.append(
            f"firefly, {line['dtype']}: bare matrix products are {line['share_of_floor']:.2f} of its time (goal "
            f"{FLOORS[line['dtype']]}). The others, by operation below, go at the pace of memory and of float32."
        )
    for line in (line for line in lines if "profiled" in line):
        shares = [f"{name} {share:.1%}" for name, share in line.items() if name != "profiled"]
        remarks.append(f"{line['profiled']}: where the time of firefly's operations goes: {', '.join(shares)}.")
    return remarks


def activations(line: dict[str, Any]) -> float:
    """Peak memory in GB without libraries, rows, weights, gradients and moments."""
    return float(line["peak_rss_gb"] - line["libraries_gb"] - line["state_gb"])


def bounded(lines: Lines) -> list[str]:
    """Sentences that say whether memory grows with the vocabulary within its bound."""
    return [
        f"At a vocabulary of {line['vocabularies'][1]:,}, {line['peak_rss_gb'] - line['tokenizer_gb']:.2f} GB beside "
        f"the {line['tokenizer_gb']} that its tokenizer adds; 1.3 times the peak at {line['vocabularies'][0]:,} and "
        f"what weights, gradients and moments grow by, the bound, are {line['bound_gb']} GB."
        for line in lines
        if line.get("axis") == "memory bound"
    ]


def pruned(lines: Lines) -> list[str]:
    """Sentences that compare pruning with the other systems on each disk, and say whether the weights are right."""
    runs = [line for line in lines if "system" in line]
    same = all(line["same_weights"] for line in runs if "same_weights" in line)
    remarks = [f"Weights that stay are {'bit for bit the old ones' if same else 'NOT the old ones'} in all."]
    for whole in (line for line in lines if "times_as_long" in line):
        times, seconds = whole["times_as_long"], whole["seconds"]
        here = {line["system"]: line for line in runs if line["file_system"] == whole["of"]}
        linked = f", with `--link` {seconds['llmpruner'] / seconds['linked']:.1f}" if "linked" in seconds else ""
        remarks.append(
            f"On {whole['of']}, `firefly prune` is {times['llmpruner']} times as fast as LLMPruner's way{linked} "
            f"(goal 5); a bare copy takes {times['copy']} times as long."
        )
        ours = {**here["firefly"], "seconds": seconds["firefly"]}
        disk = {**here["dd"], "seconds": seconds["dd"]} if "dd" in here else ours
        if pace(disk) > pace(ours):  # if not, blocks were shared or much was in the page cache
            least = (ours["read_gb"] + ours["written_gb"]) / pace(disk)
            remarks.append(
                f"There it reads and writes {pace(ours):.2f} GB/s. Past the page cache the disk does {pace(disk):.2f}: "
                f"it takes {least:.0f} s for the bytes of both models, and no way that moves them all could be more "
                f"than {seconds['llmpruner'] / least:.1f} times as fast as LLMPruner's."
            )
    return remarks


def pace(line: dict[str, Any]) -> float:
    """GB that a run read and wrote a second."""
    return float(line["read_gb"] + line["written_gb"]) / float(line["seconds"])


def tokenised(lines: Lines) -> list[str]:
    """Sentences that compare tokenising with doing it row by row, and give the time of a start with a cache."""
    start = next(line for line in lines if line.get("system") == "cached_start")
    same = "the same tokens" if lines[-1]["same_tokens"] else "OTHER tokens"
    return [
        f"{lines[-1]['times_as_fast']} times the rows a second of the better run row by row (goal 3), and {same}.",
        f"With the cache, the first batch is there after {start['seconds']} s (goal 5), and {start['imports']} s of "
        "imports.",
    ]


def started(lines: Lines) -> list[str]:
    """Sentences that say which goals are met, and how much of the start of a training are imports."""
    seconds = {line["command"]: line["seconds"] for line in lines}
    missed = [line["command"] for line in lines if line["seconds"] > line.get("goal", 1e9)]
    floor = seconds["imports: torch, Lightning, transformers"]
    return [
        f"Goals {'all met' if not missed else 'missed: ' + ', '.join(missed)}.",
        f"Of the {seconds['firefly-fit fit']} s of a training, {floor} are imports of what it is made with.",
    ]


PARTS = {
    "start": Part(
        "Start", "Seconds from the start of a command until its help, the first character of an answer, or the first "
        "step of a training with cached token ids is there; medians on a warm cache of pages.",
        [],
        ["command", "seconds", "goal"],
        started,
    ),
    "throughput": Part(
        "Training", "Real tokens a second, without padding, on the same rows. The share of the floor is the time "
        "of the bare matrix products of the same steps, measured in the same process, in the time that the steps took. "
        "A process imports its own system's libraries only. Fixed is the memory of those and of rows before a model is "
        "there, and of weights, gradients and moments. "
        "`frugal` is firefly with `MALLOC_MMAP_THRESHOLD_=1048576`: glibc then gives memory back as it is freed.",
        ["--dtypes", "fp32", "bf16"],
        ["system", "dtype", "tokens_per_second", "target_tokens_per_second", "peak_rss_gb", "libraries_gb", "state_gb",
         "share_of_floor", "loss"],
        compared,
    ),
    "lora": Part(
        "Training an adapter", "LoRA of rank 8 on the four linear layers of each block: `lora` is this project, `peft` "
        "transformers.Trainer with the same adapter, `firefly` this project training all weights. Figures as above; "
        "the floor of frozen weights lacks the products of their gradients.",
        ["--dtypes", "fp32", "bf16"],
        ["system", "dtype", "tokens_per_second", "target_tokens_per_second", "peak_rss_gb", "libraries_gb",
         "share_of_floor", "loss"],
        lora.compared,
    ),
    "pretrain": Part(
        "Further pre-training", "Real tokens a second on texts, all learned: `firefly` takes each document by itself, "
        "`joined` is transformers.Trainer on the same documents joined to blocks of the greatest length.",
        ["--dtypes", "fp32", "bf16"],
        ["system", "dtype", "tokens_per_second", "target_tokens_per_second", "peak_rss_gb", "libraries_gb", "state_gb",
         "share_of_floor", "loss"],
        pretrain.compared,
    ),
    "preference": Part(
        "Preference tuning", "DPO on pairs made from real rows, a row's target against another's of the same kind, "
        "beside TRL's DPOTrainer with the reference's log-probabilities computed before. Tokens are prompt and answer "
        "of both rows of a pair, for all systems; `twice` is this project without the shared prompt.",
        ["--dtypes", "fp32", "bf16", "--batch_size", "8"],
        ["system", "dtype", "tokens_per_second", "target_tokens_per_second", "peak_rss_gb", "libraries_gb",
         "computed_share", "loss"],
        preference.compared,
    ),
    "full_size": Part(
        "Published sizes", "1b4 and 2b6 with random weights, real rows of up to 512 tokens, on two cores and 24 GiB. "
        "Peaks of resident memory, each of its own: loading, the steps, saving, and resuming. Taken is what the steps "
        "hold beside libraries and rows; planned is what `firefly plan` foretells of that.",
        [],
        ["size", "way", "step_seconds", "tokens_per_second", "share_of_floor", "planned_gb", "taken_gb", "difference",
         "peak_gb", "load_peak_gb", "save_peak_gb", "resume_peak_gb", "load_seconds", "save_seconds", "resume_seconds",
         "checkpoint_mb"],
        full_size.held_to_goals,
    ),
    "saves": Part(
        "Saving and resuming", "Weights and both moments of AdamW in float32, as a run saves and resumes them, with "
        "nothing of the files in the cache of pages, beside `dd` that moves as many bytes; a share is of what `dd` "
        "does past the cache, in the same round. A save beside a training keeps it for its seconds; it is whole after "
        "those of the line below it. A resumed run has read and digested every byte.",
        [],
        ["what", "gb", "seconds", "gb_per_second", "of_disk"],
        saves.held_to_goals,
    ),
    "answers": Part(
        "Answers", "Generated tokens a second of greedy answers to the same prompts: `firefly` is what `predict`, "
        "`test` and `chat` do, `generate` transformers.generate with as many rows at a time, `grouped` the same with "
        "prompts of like length together, `llama.cpp` and `q8_0` the model's GGUF in xllamacpp. The answers of random "
        "models, named by width, blocks and heads, are as long as the rows' targets.",
        [],
        ["at_a_time", "model", "system", "tokens_per_second", "tokens", "seconds", "peak_rss_gb", "same_answers"],
        answers.compared,
    ),
    "ladder": Part(
        "What each lever brings", "Each line adds a lever to those above, as a plain loop. Seconds for 1,000 tokens "
        "without padding, measured, and predicted from counts: operations of products at the rate of a bare product, "
        "bytes of all else at that of a bare copy.",
        [],
        ["rung", "tokens_per_second", "measured", "predicted", "tflop", "gb_moved", "peak_rss_gb", "share_of_floor"],
        lambda lines: [],
    ),
    "growth": Part(
        "Growth", "With the length of rows, the vocabulary and the number of blocks; a step is one row where a row has "
        "more tokens than a step.",
        [],
        ["axis", "value", "system", "tokens_per_second", "peak_rss_gb", "libraries_gb", "share_of_floor"],
        bounded,
    ),
    "prune": Part(
        "Pruning", "A checkpoint in the shape of bloom-7b1, beside LLMPruner's way, a bare copy of its bytes, and "
        "`dd`, two files at a time past the page cache. `linked` is `firefly prune --link`; on XFS, blocks that do "
        "not change are shared without it.",
        [],
        ["system", "file_system", "seconds", "seconds_on_disk", "peak_rss_gb", "read_gb", "written_gb"],
        pruned,
    ),
    "validation": Part(
        "Validation", "Time of a token in a validation, with the loss and accuracies of each kind, beside that of a "
        "token in training.",
        ["--dtypes", "fp32", "bf16"],
        ["dtype", "rows_of_validation", "training_microseconds", "validation_microseconds", "share"],
        validation.held_to_goals,
    ),
    "micro_batches": Part(
        "Micro-batches", "A step of 64 rows, in micro-batches of at most 16 rows, and in as few as have no more tokens "
        "than the heaviest of 16 rows would have if rows were put together by their lengths.",
        ["--dtypes", "fp32", "bf16"],
        ["bound", "dtype", "micro_batches", "tokens_per_second", "peak_rss_gb", "libraries_gb"],
        micro_batches.compared,
    ),
    "clean": Part(
        "Cleaning", "Rows made of real ones, with copies and near copies among them, beside datatrove's MinHash with "
        "as many bands of as many hashes; `one_process` is firefly with `--workers 1`, `before` the release before it "
        "worked on all cores. Memory is that of all processes.",
        [],
        ["system", "rows", "kept", "seconds", "rows_per_second", "peak_rss_gb"],
        clean.compared_systems,
    ),
    "clean_large": Part(
        "Cleaning ten million rows", "Memory of all processes of the command, a page that several share counted once; "
        "the figure has it over the time.",
        [],
        ["rows", "kept", "seconds", "rows_per_second", "memory_gb"],
        clean_large.held_to_goal,
    ),
    "survive": Part(
        "A run that survives its machines", "An elastic run on three nodes, a process on each, with a save in every "
        "step: what was killed, how long it took until the run went on, and with a node that came back. The figure has "
        "the losses beside those of a run that nobody disturbed.",
        [],
        ["kill", "what", "after_step", "during_a_save", "goes_on_at", "seconds", "seconds_to_join"],
        survive.held_to_goals,
    ),
    "before_after": Part(
        "Before and after", "Scripts of these benchmarks beside a checkout from before the second round of work on "
        "speed, in turns, with the same packages; medians of rounds. A figure that looked slower was measured again.",
        [],
        ["script", "what", "unit", "rounds", "before", "after", "times_as_fast"],
        before_after.compared,
    ),
    "tokenise": Part(
        "Tokenising", "1,650,000 rows made of real ones, no two the same, beside a call of the tokenizer a text.",
        [],
        ["system", "rows", "seconds", "rows_per_second", "peak_rss_gb", "rows_gb", "cache_gb"],
        tokenised,
    ),
}  # fmt: skip

ROWS = (
    "start", "throughput", "lora", "pretrain", "preference", "full_size", "saves", "answers", "ladder", "growth",
    "validation", "micro_batches", "clean", "clean_large", "survive",
)  # fmt: skip
"""Scripts that take ``--rows`` to train on; the others make their own rows or need none."""


def main() -> None:
    """Runs the scripts, keeps their lines and writes RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="scripts to run again")
    parser.add_argument(
        "--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows or texts to train on"
    )
    parser.add_argument("--about_rows", default="those of bin/demo", help="what RESULTS.md says of the rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of RESULTS.md")
    parser.add_argument("--dry", action="store_true", help="write RESULTS.md from what is kept, measure nothing")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="last: what the scripts are also given")
    options = parser.parse_args()
    kept = options.out / "results"
    kept.mkdir(parents=True, exist_ok=True)
    for name in () if options.dry else options.only:
        measure(name, options, kept)
    text = "\n".join(written(options.out))
    (options.out / "RESULTS.md").write_text(text, "utf-8")


def measure(name: str, options: argparse.Namespace, kept: Path) -> None:
    """Runs a script, shows its lines as they come, and keeps them."""
    arguments = [*PARTS[name].arguments, "--out", str(kept / f"{name}.png"), *options.more]
    if name in ROWS:
        arguments += ["--rows", *options.rows]
    if name == "throughput":
        arguments += ["--profile", str(kept)]
    console = Console(stderr=True)
    console.print(f"{name}: {' '.join(arguments)}", highlight=False)
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    lines = []
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed when the process ends)
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("{"):
                lines.append(line)
                console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
        if run.wait():
            log.seek(0)
            sys.exit(f"{name}: {log.read()[-3000:]}")
    first = json.loads(lines[0])
    if name in ROWS:
        first["rows"] = options.about_rows
    (kept / f"{name}.jsonl").write_text(json.dumps(first) + "\n" + "".join(lines[1:]), "utf-8")


def written(folder: Path) -> list[str]:
    """The lines of RESULTS.md."""
    text = ["# Results", "", "Made by `python -m benchmarks.results` from the lines in `results/`.", ""]
    for name, part in PARTS.items():
        file = folder / "results" / f"{name}.jsonl"
        if not file.is_file():
            continue
        machine, *lines = map(json.loads, file.read_text("utf-8").splitlines())
        text += [f"## {part.title}", "", part.text, ""]
        text += [", ".join(f"{key} {value}" for key, value in machine.items()) + ".", ""]
        rows = [line for line in lines if part.columns[0] in line and line.get("axis") != "memory bound"]
        columns = [column for column in part.columns if any(column in line for line in rows)]
        text += ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |", "|---" * len(columns) + "|"]
        text += ["| " + " | ".join(str(line.get(column, "")) for column in columns) + " |" for line in rows]
        text += ["", *(f"- {remark}" for remark in part.remarks(lines)), ""]
        if (folder / "results" / f"{name}.png").is_file():
            text += [f"![{part.title}](results/{name}.png)", ""]
        profiles = sorted((folder / "results").glob("profile-*.txt")) if name == "throughput" else []
        text += [f"- Where the time of an operation goes: [{file.name}](results/{file.name})" for file in profiles]
        text += [""] if profiles else []
    return text


if __name__ == "__main__":
    main()
