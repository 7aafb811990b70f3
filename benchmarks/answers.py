"""Compares answering rows with what a user would run instead: python -m benchmarks.answers --help.

Every system answers the same prompts greedily, in a process of its own, and prints a JSON line: generated tokens a
second and the peak of memory, and of how many rows the answer is that of ``generate``. A trained model ends its answers
itself; one of random weights, which is named by its width, blocks and heads, ends each where the row's target ends.

    generate   transformers.generate, batches of rows in the order of their file
    grouped    the same, with prompts of like length in a batch
    firefly    RowsInFlight, with which predict, test and chat answer
    llama.cpp  the model's GGUF in float32, as many rows at a time
    q8_0       the same in 8 bits
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    BloomForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks import throughput
from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone

SYSTEMS = ("generate", "grouped", "firefly", "llama.cpp", "q8_0")
MODELS = ("demo_run/chat-model", "512x8x8", "2048x24x16")
"""The demo's chat model, the size of the other benchmarks, and bloom-1b4's."""


NONE = 10**9
"""A token that no vocabulary has; for none at all, transformers would take the model's own end."""


class Asked(NamedTuple):
    """A prompt, at which length its answer ends at the latest, and whether the model may end it before."""

    prompt: list[int]
    most: int
    may_end: bool


def main() -> None:
    """Measures each system with each model and number of rows at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="folders, or WIDTHxBLOCKSxHEADS")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows")
    parser.add_argument("--tokenizer", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--vocabulary", type=int, help="tokens of random models; what the tokenizer lacks is made up")
    parser.add_argument("--count", type=int, default=128, help="rows to answer")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[16, 1], help="rows at a time")
    parser.add_argument("--most", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="PNG of the figures")
    options = parser.parse_args()
    print(json.dumps(machine() | {"threads": options.threads, "rows": options.count}), flush=True)
    lines = [line for model in options.models for line in measured(model, options)]
    if options.out:
        draw(options.out, lines)


def measured(model: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures each system with a model."""
    with tempfile.TemporaryDirectory() as temporary:
        options.files = Path(temporary)
        folder, trained = Path(model), Path(model).is_dir()
        if not trained:
            folder = Path(temporary) / "model"
            alone(make_model, model, options, folder)
        asked = alone(prompts, folder, trained, options)
        expected: list[str] = []
        for batch_size, system in product(options.batch_sizes, options.systems):
            taken = asked if batch_size > 1 else asked[:: max(1, len(asked) // 8)]
            line, texts = alone(measure, folder, system, taken, batch_size, options)
            expected = texts if system == "generate" else expected
            line = {"model": Path(model).name, "at_a_time": batch_size, **line}
            if trained and expected:  # random weights say one token again and again
                same = sum(one == other for one, other in zip(texts, expected, strict=True))
                line["same_answers"] = f"{same} of {len(texts)}"
            print(json.dumps(line), flush=True)
            yield line
        for kind in ("float32", "bfloat16", "q8_0"):
            line = {"model": Path(model).name, "starts": kind, "seconds": alone(start, folder, kind, options)}
            print(json.dumps(line), flush=True)
            yield line


def make_model(sizes: str, options: argparse.Namespace, folder: Path) -> None:
    """Makes a folder of random weights, as ``firefly export`` writes one."""
    from firefly_lightning.huggingface import describe, load_config, load_tokenizer, write_description
    from firefly_lightning.prompt import PRESETS

    options.hidden, options.layers, options.heads = map(int, sizes.split("x"))
    throughput.make_model(folder, options)
    write_description(describe(load_config(str(folder)), load_tokenizer(str(folder)), PRESETS["firefly"]), folder)


def prompts(folder: Path, trained: bool, options: argparse.Namespace) -> list[Asked]:
    """Every so many-th row of the files: the ids of its prompt, and how long its answer may be."""
    from firefly_lightning.data.prompt_choice import tokenizer_and_format
    from firefly_lightning.data.sources.records import find_sources
    from firefly_lightning.data.sources.row_forms import read_rows
    from firefly_lightning.prompt import PromptEncoder

    encoder = PromptEncoder(*tokenizer_and_format(str(folder)))
    rows = [row for file in find_sources(options.rows) for row in read_rows(file)]
    asked = []
    for row in rows[:: max(1, len(rows) // options.count)][: options.count]:
        question, target = row.turns[0]
        length = len(encoder.encode([[(question, target)]])[0][0]) - len(encoder.encode_question([], question))
        most = options.most if trained else max(1, min(length, options.most))
        asked.append(Asked(encoder.encode_question([], question)[-1024:], most, may_end=trained))
    return asked


def measure(
    folder: Path, system: str, asked: Sequence[Asked], batch_size: int, options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Answers the prompts with one system; gives its line and the answers."""
    torch.set_num_threads(options.threads)
    prepare = {"generate": stock, "grouped": stock, "firefly": ours}.get(system, llama)
    answer = prepare(folder, system, batch_size, options)
    answer(asked[:1])
    began = time.perf_counter()
    answers = answer(asked)
    seconds = time.perf_counter() - began
    tokens = sum(count for _, count in answers)
    line = {"system": system, "tokens": tokens, "seconds": round(seconds, 2), "peak_rss_gb": peak_gb()}
    line["tokens_per_second"] = round(tokens / seconds, 1)
    return line, [text for text, _ in answers]


Answers = list[tuple[str, int]]
"""The text of each answer, and the number of its tokens."""


def stock(folder: Path, system: str, batch_size: int, options: argparse.Namespace) -> Callable[..., Answers]:
    """Answers by ``transformers.generate``."""
    model = BloomForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pad = tokenizer.pad_token_id

    class EndOfRow(StoppingCriteria):  # type: ignore[misc]  # untyped base
        def __init__(self, width: int, most: list[int]) -> None:
            self.width, self.most = width, torch.tensor(most)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **named: Any) -> torch.Tensor:
            return self.most <= input_ids.shape[1] - self.width

    def answer(asked: Sequence[Asked]) -> Answers:
        end = tokenizer.eos_token_id if asked[0].may_end else NONE
        config = GenerationConfig(
            max_new_tokens=options.most, do_sample=False, repetition_penalty=1.0, eos_token_id=end, pad_token_id=pad
        )
        order = list(range(len(asked)))
        if system == "grouped":
            order.sort(key=lambda at: -len(asked[at].prompt))
        found: dict[int, tuple[str, int]] = {}
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            width = max(len(asked[at].prompt) for at in batch)
            ids = torch.tensor([[pad] * (width - len(asked[at].prompt)) + asked[at].prompt for at in batch])
            mask = torch.tensor([[0] * (width - len(asked[at].prompt)) + [1] * len(asked[at].prompt) for at in batch])
            ends = StoppingCriteriaList([EndOfRow(width, [asked[at].most for at in batch])])
            output = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=ends)
            for at, row in zip(batch, output[:, width:].tolist(), strict=True):
                answer = row[: asked[at].most]
                answer = answer[: answer.index(end)] if end in answer else answer
                found[at] = tokenizer.decode(answer, skip_special_tokens=True), len(answer)
        return [found[at] for at in range(len(asked))]

    return answer


def ours(folder: Path, system: str, batch_size: int, options: argparse.Namespace) -> Callable[..., Answers]:
    """Answers as ``predict`` does, with the longest prompts first."""
    from firefly_lightning.evaluation.rows_in_flight import Row, RowsInFlight
    from firefly_lightning.evaluation.token_choice import TokenChoice
    from firefly_lightning.huggingface import load_bloom, load_tokenizer
    from firefly_lightning.model.fast_bloom import FastBloom

    class Bounded(Row):
        def take(self, token: int, end: int, most: int) -> None:
            super().take(token, end, self.about)

    tokenizer = load_tokenizer(str(folder))
    bloom = FastBloom(load_bloom(str(folder), torch.float32).eval())

    def answer(asked: Sequence[Asked]) -> Answers:
        end = tokenizer.eos_token_id if asked[0].may_end else -1
        in_flight = RowsInFlight(bloom, TokenChoice(options.most), end, batch_size)
        rows = [Bounded(one.prompt, one.most) for one in asked]
        in_flight.add(sorted(rows, key=lambda row: -row.length))
        for _ in in_flight.answered(rest=True):
            pass
        return [(tokenizer.decode(row.answer, skip_special_tokens=True), len(row.answer)) for row in rows]

    return answer


def start(folder: Path, kind: str, options: argparse.Namespace) -> float:
    """Seconds from the end of the imports of ``firefly chat`` to the first characters of an answer, on a warm cache."""
    import xllamacpp  # noqa: F401

    from firefly_lightning.chat.answering import Answering
    from firefly_lightning.chat.llama import LlamaAnswering

    torch.set_num_threads(options.threads)
    for file in (path for path in folder.iterdir() if path.is_file()):
        file.read_bytes()
    path = str(gguf_of(folder, kind, options)) if kind == "q8_0" else str(folder)
    began = time.perf_counter()
    answer: Any = (
        LlamaAnswering(path, seed=1, max_new_tokens=20)
        if kind == "q8_0"
        else Answering(path, "cpu", kind, seed=1, max_new_tokens=20)
    )
    next(answer([], "你好"), None)
    return round(time.perf_counter() - began, 2)


def gguf_of(folder: Path, kind: str, options: argparse.Namespace) -> Path:
    """The model's GGUF, which is made where it is not there yet."""
    from firefly_lightning.export import export

    file = Path(options.files) / f"{kind}.gguf"
    if not file.exists():
        alone(export, str(folder), None, None, "5GB", False, None, str(file), kind)
    return file


def llama(folder: Path, system: str, batch_size: int, options: argparse.Namespace) -> Callable[..., Answers]:
    """Answers by llama.cpp, of which a server in this process takes as many rows at a time."""
    import xllamacpp

    file = gguf_of(folder, "q8_0" if system == "q8_0" else "f32", options)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_parallel, settings.n_ctx = str(file), batch_size, 2048 * batch_size
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = options.threads
    settings.ui, settings.verbosity = False, -1
    server = xllamacpp.Server(settings)

    def ask(one: Asked) -> tuple[str, int]:
        greedy = {"temperature": 0, "repeat_penalty": 1, "cache_prompt": False, "ignore_eos": not one.may_end}
        found = server.handle_completions({"prompt": one.prompt, "max_tokens": one.most, **greedy})
        choice = found["choices"][0]
        return choice["text"], found["usage"]["completion_tokens"] - (choice["finish_reason"] == "stop")

    def answer(asked: Sequence[Asked]) -> Answers:
        with ThreadPoolExecutor(batch_size) as pool:
            return list(pool.map(ask, asked))

    return answer


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Draws tokens a second, a line of panels for each model, one for each number of rows at a time."""
    from matplotlib.figure import Figure

    lines = [line for line in lines if "system" in line]
    models, counts = (list(dict.fromkeys(line[key] for line in lines)) for key in ("model", "at_a_time"))
    figure = Figure(figsize=(4.6 * len(counts), 2.2 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(counts), squeeze=False)
    for axes, group in zip(panels.flat, product(models, counts), strict=True):
        shown = [line for line in lines if (line["model"], line["at_a_time"]) == group]
        names = [line["system"] for line in shown]
        colors = [throughput.BLUE if name == "firefly" else throughput.GREY for name in names]
        axes.bar_label(axes.barh(names, [line["tokens_per_second"] for line in shown], color=colors), padding=3)
        axes.set_title(f"{group[0]}, {group[1]} at a time", fontsize=10)
        axes.set_xlabel("tokens/s")
        axes.margins(x=0.2)
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def compared(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that compare the systems with ``generate``, for each model and number of rows at a time."""
    remarks = [
        f"{line['model']}: `firefly chat` in {line['starts']} has the first characters {line['seconds']} s after its "
        f"imports, on a warm cache of pages{' (goal 1.5)' if line['starts'] == 'float32' else ''}."
        for line in lines
        if "starts" in line
    ]
    for ours_ in (line for line in lines if line.get("system") == "firefly"):
        here = {
            line["system"]: line["tokens_per_second"]
            for line in lines
            if (line.get("model"), line.get("at_a_time")) == (ours_["model"], ours_["at_a_time"])
        }
        times = [f"{here['firefly'] / speed:.1f} times {name}" for name, speed in here.items() if name != "firefly"]
        goal = " (goal 3 times generate)" if ours_["at_a_time"] > 1 else ""
        remarks.append(f"{ours_['model']}, {ours_['at_a_time']} at a time: {', '.join(times)}{goal}.")
    return remarks


if __name__ == "__main__":
    main()
