"""Every command and snippet of the README and of the documentation, run in the order in which a reader meets them."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BloomForCausalLM

from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.data.sources.row_forms import read_rows
from tests.conftest import write_rows
from tests.support.choice import DIVIDED
from tests.support.helpers import ROOT, forked, logged, run, run_forked
from tests.support.llama import llama_folder
from tests.support.pair_runs import made_pairs
from tests.support.ranks import run_rank
from tests.support.readme import NOT_HERE, READMES, Block, commands, pages, read_blocks, write_file

SHORT = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SHORT += ["--model.decoding.max_new_tokens", "8"]


@pytest.fixture
def box(tmp_path, model_folder, reviews, monkeypatch):
    """A folder with what the README says a reader has: raw rows and a Bloom."""
    shutil.copytree(model_folder, tmp_path / "bloom-1b7")
    (tmp_path / "raw").mkdir()
    example = next(json.loads(block.code) for block in read_blocks(READMES["en"]) if block.language == "json")
    rows = [{"text": text[:60], "label": ["positive", "negative"][at % 2]} for at, text in enumerate(reviews[:60])]
    write_rows(tmp_path / "raw" / "reviews.jsonl", [example, *rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def full_box(box, model_folder, reviews, monkeypatch):
    """The same with what else the pages need: more raw rows, a smaller tokenizer, the clone's configs."""
    shutil.copytree(ROOT / "configs", box / "configs")
    weather = [{"weather": name, "advice": f"{name}天要小心。"} for name in ("下雨", "下雪", "刮风", "炎热")]
    write_rows(box / "raw" / "weather.jsonl", weather)
    write_rows(box / "raw" / "pairs.jsonl", made_pairs(reviews, 40))
    said = ["在吗？", "在，请讲。"]
    write_rows(box / "raw" / "dialogs.jsonl", [{"dialog": said}, {"kind": "Greeting", "dialog": said * 2}])
    corpus = box / "corpus.txt"
    corpus.write_text("\n".join(reviews[:20]), "utf-8")
    run("firefly", "prune", "--model", model_folder, "--corpus", corpus, "--out", box / "smaller")
    (box / "small-tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(box / "smaller" / name, box / "small-tokenizer")
    monkeypatch.syspath_prepend(str(box))
    yield box
    for name in ("my_project", "my_hinge", "my_rows", "my_strategy"):
        sys.modules.pop(name, None)


def test_every_command_of_the_readme(box, monkeypatch):
    assert run_blocks(read_blocks(READMES["en"]), README_CHECKS, box, monkeypatch) == (7, 0, 1)


def test_every_command_and_snippet_of_the_documentation(full_box, monkeypatch):
    """The pages are one running example, in the order of the navigation; `tests/chat/test_serving.py` runs one page."""
    blocks = [block for page in pages("en") if page.stem != "serving" for block in read_blocks(page)]
    assert run_blocks(blocks, CHECKS, full_box, monkeypatch) == (61, 4, 8)


def run_blocks(blocks: list[Block], checks: dict, box: Path, monkeypatch) -> tuple[int, int, int]:
    """Runs all; returns how many commands and snippets there were, and files to write."""
    done, snippets, files = [], 0, 0
    for block in blocks:
        if block.path:
            write_file(box, block)
            files += 1
        elif block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.code, "snippet", "exec"), {"__name__": "__main__"})
            check_snippet(block.code, box, out.getvalue())
            snippets += 1
        for command in commands([block]):
            if not command.startswith(NOT_HERE):
                done.append(check_command(command, checks, box, monkeypatch))
    assert sorted(done) == sorted(checks), "each check belongs to one command"
    return len(done), snippets, files


def check_command(command: str, checks: dict, box: Path, monkeypatch) -> str:
    """Runs a command as it stands, a training with fewer steps; returns what its check is called."""
    names = [start for start in checks if re.match(start, command)]
    assert len(names) == 1, f"{command}: has the checks {names}; write one for it"
    name, *args = (part for part in shlex.split(command) if part != "PYTHONPATH=.")
    if "firefly-fit" in command and not args[-1].endswith("help"):
        args += SHORT
    if DIVIDED and re.search(OF_SEVERAL, command) and "runs/moved" not in command:
        args = args[args.index("fit") :]
        assert "\nmodel:\n" in run("firefly-fit", *args, "--print_config", cwd=box).stdout
        return names[0]
    if re.search("firefly-fit fit .*[^p]$", command):  # no --help
        last = next(step for part, step in LAST_STEPS.items() if part in command)
        args += ["--trainer.max_steps", last, "--trainer.val_check_interval", "2"]
    if name == "npx":
        checks[names[0]](box, of_node(args))
        return names[0]
    if "--web" in args:
        check_page([name, *args], box)
        return names[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n/exit\n"))
    ranks = partial(run_forked, whole=True) if name != "torchrun" and "--trainer.devices" in args else None
    result = run(name, *args, process=name == "torchrun", cwd=box, how=ranks)
    checks[names[0]](box, result.stdout)
    return names[0]


def of_node(args: list[str]) -> str:
    """What a program of node-llama-cpp prints that is asked once, in colours that are left out."""
    program, *others = args
    command = [
        Path(llama_folder()) / "node_modules" / ".bin" / program,
        *others,
        "--prompt",
        "你好",
        "--maxTokens",
        "8",
    ]
    text = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300).stdout
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)


OF_SEVERAL = "--nproc_per_node|--trainer.devices 2"
"""Trainings on several devices: a divided run reads their configuration only, and other tests train like them."""

LAST_STEPS = {"runs/back": "9", "runs/moved": "7", "--ckpt_path last": "5", "": "3"}
"""By a part of the command, the first that it has; runs that go on elsewhere go further each time."""


def check_snippet(code: str, box: Path, out: str) -> None:
    if "chat-model" in code:
        assert out.strip()
    elif "build(" in code:
        asked = [row.turns[0][0] for row in read_rows(str(box / "weather-all.jsonl"))]
        assert len(set(asked)) == len(asked) == 8, "two templates, four rows"
    elif "cross_entropy" in code:
        losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", out, re.MULTILINE)]
        assert len(losses) == len(out.splitlines()) == 8, "61 rows, eight a step"
        assert losses[-1] < losses[0]
    else:
        assert list((box / "runs" / "python").rglob("*step=4.ckpt"))


def check_help(*flags: str):
    def check(box: Path, out: str) -> None:
        assert all(flag in out for flag in flags)

    return check


def check_rows(name: str, kind: str, count: int):
    def check(box: Path, out: str) -> None:
        assert [row.kind for row in read_rows(str(box / name))] == [kind] * count

    return check


def check_pruned(name: str, verified: bool):
    def check(box: Path, out: str) -> None:
        report = json.loads((box / name / "pruning.json").read_text("utf-8"))
        assert report["vocabulary"]["after"] < report["vocabulary"]["before"]
        assert ("verified" in report) == verified
        assert BloomForCausalLM.from_pretrained(box / name).config.vocab_size == report["vocabulary"]["after"]

    return check


OF_ROWS = ("val_perplexity", "val_accuracy", "val_eos_accuracy")
OF_PAIRS = ("val_reward_accuracy", "val_reward_margin", "val_chosen_log_prob", "val_rejected_log_prob")


def check_run(name: str, steps: range, version: int = 0, pairs: bool = False, validations: int = 1, **columns: int):
    def check(box: Path, out: str) -> None:
        root = box / "runs" / name
        assert sorted(logged(root, version=version)) == list(steps)
        for column in ("lr", "grad_norm", "target_tokens_per_second", "data_wait", "memory_gb", "mfu", "epoch"):
            assert logged(root, column, version).keys() >= set(steps), column
        for column, count in {
            "val_loss": validations,
            **dict.fromkeys(OF_PAIRS if pairs else OF_ROWS, validations),
            **columns,
        }.items():
            assert len(logged(root, column, version)) == count, column
        folder = root / "lightning_logs" / f"version_{version}"
        files = {"config.yaml", "loss.png", "pairs.png" if pairs else "kinds.png", "report.md", "metrics.csv"}
        assert files <= {file.name for file in folder.iterdir()}
        assert list(folder.glob("events.out.tfevents.*"))
        assert find_checkpoint(str(root / "checkpoints")).name == "last.ckpt"
        assert list((root / "checkpoints").glob("best-step=*-val_loss=*.ckpt"))

    return check


def check_watched(box: Path, out: str) -> None:
    check_run("watched", range(3))(box, out)
    assert out.count("  今天下雨，出门要注意什么？\n    ") == 1


def check_dialogs(box: Path, out: str) -> None:
    check_run("dialogs", range(3))(box, out)
    report = (box / "runs" / "dialogs" / "lightning_logs" / "version_0" / "report.md").read_text("utf-8")
    assert {"Chat": "1", "Greeting": "1", "SentimentAnalyze": "61"}.items() <= dict(
        re.findall(r"^\| (\w+) \| (\d+) \|", report.split("## Data")[1], re.MULTILINE)
    ).items()


def check_half(box: Path, out: str) -> None:
    """The same rows and losses as plain DDP; gradients that were rounded on their way."""
    check_run("half", range(3))(box, out)
    roots = box / "runs" / "half", box / "runs" / "two"
    assert float(logged(roots[0])[0]) == pytest.approx(float(logged(roots[1])[0]), rel=1e-5)
    half, whole = (float(logged(root, "grad_norm")[0]) for root in roots)
    assert half == pytest.approx(whole, rel=1e-3)
    assert half != whole


def check_page(command: list[str], box: Path) -> None:
    """Serves the page in a process of its own on a free port, asks it for what a browser would, and ends it."""
    said = box / "page.txt"
    server = forked(run_rank, [[*command, "--port", "0"]], dict(os.environ), said, said, box, True)
    try:
        address = None
        while not address:
            assert server.is_alive()
            time.sleep(0.05)
            text = said.read_text("utf-8") if said.exists() else ""
            address = re.search(r"(http://127\.0\.0\.1:\d+) is the chat page", text)
        with urllib.request.urlopen(f"{address[1]}/", timeout=20) as page:
            assert "Firefly" in page.read().decode()
        with urllib.request.urlopen(f"{address[1]}/settings", timeout=20) as settings:
            assert json.load(settings)["model"] == "chat-model"
    finally:
        os.kill(server.pid, signal.SIGINT)
        server.join(timeout=30)
    assert server.exitcode == 128 + signal.SIGINT


def check_moved(name: str, steps: range):
    def check(box: Path, out: str) -> None:
        assert sorted(logged(box / "runs" / name)) == list(steps)

    return check


def check_evaluation(stage: str, *scores: str, run: str = "first"):
    def check(box: Path, out: str) -> None:
        versions = sorted((box / "runs" / run / "lightning_logs").glob("version_*"))
        for name in (f"{stage}_{metric}" for metric in ("loss", "perplexity", "accuracy", "eos_accuracy", *scores)):
            assert logged(box / "runs" / run, name, len(versions) - 1), name

    return check


def check_predictions(box: Path, out: str) -> None:
    written = sorted((box / "runs" / "first" / "lightning_logs").glob("version_*/predictions.jsonl"))
    assert len(written) == 2, "a test's, and these"
    rows = [json.loads(line) for line in written[1].read_text("utf-8").splitlines()]
    assert [row["target"] for row in rows] == [
        row.turns[0][1] for row in read_rows(str(box / "data" / "reviews.jsonl"))
    ]


def check_gguf(box: Path, out: str) -> None:
    assert re.search(r"chat-model.gguf: a GGUF of [\d,]+ tokens in q8_0, .* texts have the same [\d,]+ tokens", out)


def check_answer_of_node(box: Path, out: str) -> None:
    assert "Wrapper: JinjaTemplate" in out
    assert re.search(r"> 你好\s+AI: ", out)


def check_exported(name: str):
    def check(box: Path, out: str) -> None:
        assert BloomForCausalLM.from_pretrained(box / name).config.vocab_size
        assert AutoTokenizer.from_pretrained(box / name).chat_template

    return check


def check_adapter(box: Path, out: str) -> None:
    assert {path.name for path in (box / "lora-adapter").iterdir()} >= {"adapter_config.json", "tokenizer.json"}


def check_answer(box: Path, out: str) -> None:
    assert out.endswith("\n")


def check_conversation(box: Path, out: str) -> None:
    assert out.count("> ") >= 2


def check_cleaned(box: Path, out: str) -> None:
    kept = [row.kind for row in read_rows(str(box / "cleaned.jsonl"))]
    report = json.loads((box / "cleaned.jsonl.report.json").read_text("utf-8"))
    assert report["counts"]["all"]["read"] == 65
    assert report["counts"]["all"]["kept"] == len(kept) > 50
    assert set(kept) == {"SentimentAnalyze", "Weather"}


def check_counted(box: Path, out: str) -> None:
    assert {path.name for path in (box / "stats").iterdir()} == {"tasks.png", "lengths.png", "stats.json"}
    kinds = json.loads((box / "stats" / "stats.json").read_text("utf-8"))["kinds"]
    assert {kind: of["rows"] for kind, of in kinds.items()} == {"all": 65, "SentimentAnalyze": 61, "Weather": 4}


def check_planned(box: Path, out: str) -> None:
    assert {path.name for path in (box / "plan").iterdir()} == {"plan.json", "memory.png"}
    plan = json.loads((box / "plan" / "plan.json").read_text("utf-8"))
    assert plan["epoch"]["rows"] == 66, "58 of 61 reviews are trained on, and four rows of weather twice"


def check_measured(box: Path, out: str) -> None:
    assert re.search(r"^ auto, 1 × 4 +\d+ +\d+ +[+-]\d+\.\d%", out, re.MULTILINE)


def check_sizes(parameters: str):
    def check(box: Path, out: str) -> None:
        assert f"model: {parameters} parameters" in out

    return check


CHECKS = {
    "firefly --help": check_help("prune", "build", "clean", "stats", "plan", "export", "chat"),
    "firefly prune --help": check_help("--corpus", "--tokenizer", "--min_count", "--keep", "--pad_multiple"),
    "firefly-fit fit --model.help": check_help("--model.path", "--model.learning_rate"),
    "firefly-fit fit --data.help": check_help("--data.train_files", "--data.too_long"),
    "firefly-fit fit --help": check_help("model.path", "trainer.max_steps", "checkpoint.keep"),
    "firefly build .*Sentiment": check_rows("data/reviews.jsonl", "SentimentAnalyze", 61),
    "firefly build .*Weather": check_rows("data/weather.jsonl", "Weather", 4),
    "firefly clean": check_cleaned,
    "firefly stats": check_counted,
    "firefly plan --config train.yaml --out": check_planned,
    "firefly plan --config train.yaml .*--measure": check_measured,
    "firefly plan .*firefly-1b4.*--precision": check_sizes("1,303,111,680"),
    "firefly plan .*firefly-2b6.*--precision": check_sizes("2,478,435,840"),
    "firefly plan .*firefly-1b4.*--memory": check_sizes("1,303,111,680"),
    "firefly plan .*firefly-2b6.*--memory": check_sizes("2,478,435,840"),
    "firefly prune .*--corpus .*--out bloom-1b4-zh": check_pruned("bloom-1b4-zh", verified=True),
    "firefly prune .*--tokenizer": check_pruned("bloom-small", verified=False),
    "firefly-fit fit --config train.yaml$": check_run("first", range(3)),
    "firefly-fit fit .*configs/firefly-1b4.yaml": check_run("firefly-1b4", range(3)),
    "firefly-fit fit .*ddp": check_run("two", range(3)),
    "firefly-fit fit .*runs/watched$": check_watched,
    "firefly-fit fit .*zero2$": check_run("zero2", range(3)),
    "firefly-fit fit .*native_tp.yaml": check_run("native", range(3)),
    "firefly-fit fit .*gemini.yaml": check_run("gemini", range(3)),
    "torchrun --nproc_per_node": check_run("torchrun", range(3)),
    "firefly-fit fit .*runs/asynchronous$": check_run("asynchronous", range(3)),
    "torchrun --nnodes 1:3": check_run("elastic", range(3)),
    "firefly-fit predict": check_predictions,
    "firefly-fit fit .*sgd.yaml": check_run("sgd", range(3)),
    "firefly-fit fit .*configs/lora.yaml": check_run("lora", range(3)),
    "firefly-fit fit .*configs/qlora.yaml": check_run("qlora", range(3)),
    "firefly export .*--out lora-model$": check_exported("lora-model"),
    "firefly export .*--adapter$": check_adapter,
    "firefly chat --model lora-adapter": check_answer,
    "firefly-fit fit .*low-memory.yaml": check_run("low-memory", range(3)),
    "firefly-fit fit .*--ckpt_path last": check_run("first", range(5), validations=2),
    "firefly-fit fit .*runs/moved$": check_moved("moved", range(5, 7)),
    "firefly-fit fit .*runs/back$": check_moved("back", range(7, 9)),
    "firefly-fit validate": check_evaluation("val"),
    "firefly-fit test": check_evaluation("test", *(f"{name}_of/Weather" for name in ("bleu", "chrf", "rouge_l"))),
    "firefly export .*--out tuned-model$": check_exported("tuned-model"),
    "firefly-fit fit .*--model.path tuned-model": check_run("preferred", range(3), pairs=True),
    "firefly prune .*--out stages/pruned$": check_pruned("stages/pruned", verified=False),
    "firefly-fit fit .*runs/stage-2$": check_run("stage-2", range(3)),
    "firefly export .*--out stages/pretrained$": check_exported("stages/pretrained"),
    "firefly-fit fit .*runs/stage-3$": check_run("stage-3", range(3)),
    "firefly export .*--out stages/tuned$": check_exported("stages/tuned"),
    "firefly-fit fit .*runs/stage-4$": check_run("stage-4", range(3), pairs=True),
    "firefly export .*--out stages/preferred$": check_exported("stages/preferred"),
    "firefly chat --model stages/preferred": check_answer,
    "PYTHONPATH=. firefly-fit fit .*my_hinge": check_run("hinge", range(3), pairs=True),
    "firefly export .*--out chat-model$": check_exported("chat-model"),
    "firefly export .*--gguf": check_gguf,
    "npx node-llama-cpp chat": check_answer_of_node,
    "firefly chat --model chat-model .*--prompt": check_answer,
    "firefly chat --gguf chat-model.gguf": check_answer,
    "firefly chat --model chat-model$": check_conversation,
    "firefly chat .*--web$": check_page,
    "PYTHONPATH=. firefly-fit fit .*my_project": check_run("mine", range(3), penalty=3),
    "PYTHONPATH=. firefly-fit fit .*my_rows": check_dialogs,
    "PYTHONPATH=. firefly-fit fit .*my_strategy": check_half,
}
"""By a pattern that one command of the pages matches from its start: what it must have made."""

README_CHECKS = {
    "firefly build": check_rows("rows.jsonl", "SentimentAnalyze", 61),
    "firefly prune": check_pruned("bloom-zh", verified=True),
    "firefly-fit fit --config reviews.yaml$": check_run("reviews", range(3)),
    "firefly-fit fit .*--ckpt_path last": check_run("reviews", range(5), validations=2),
    "firefly-fit validate": check_evaluation("val", run="reviews"),
    "firefly export": check_exported("reviews-model"),
    "firefly chat .*--prompt": check_answer,
}
"""The same for the README."""
