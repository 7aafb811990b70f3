"""What a run shows while it trains and leaves for people to read."""

import io
import re
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import yaml
from lightning import __version__ as lightning_version
from rich.console import Console
from rich.progress import Progress, TextColumn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from firefly_lightning.callbacks import run_figures
from firefly_lightning.callbacks.progress_bar import SHOWN, RunProgressBar
from firefly_lightning.callbacks.run_figures import draw_kinds, read_metrics
from firefly_lightning.callbacks.sample_answers import PROMPTS
from firefly_lightning.data.counts_table import HEADINGS
from firefly_lightning.preparation.figures import BLUE
from tests.conftest import write_rows
from tests.support.helpers import fit, logged, run
from tests.support.predicting import DECODING


@pytest.fixture(scope="module")
def rows(tmp_path_factory, reviews):
    kinds = ["对联", "Summary", "a|b$c"]
    texts = [
        {"kind": kinds[at % 3], "input": text[:30], "target": text[30:42] or "好"} for at, text in enumerate(reviews)
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", texts[:60])


@pytest.fixture(scope="module")
def shown(tmp_path_factory, model_folder, rows):
    """A run of four steps and two validations, and what it printed, on a wide terminal."""
    root = tmp_path_factory.mktemp("shown")
    every = [
        "--trainer.val_check_interval",
        2,
        "--trainer.check_val_every_n_epoch",
        "null",
        "--data.micro_batch_size",
        4,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "250")
        printed = run(
            "firefly-fit", "fit", "--model.path", model_folder, "--data.train_files", rows, "--data.val_fraction", 0.4,
            "--trainer.default_root_dir", root, "--trainer.accelerator", "cpu", "--trainer.max_steps", 4,
            "--model.warmup_steps", 2, "--data.batch_size", 8, *every, *DECODING,
        ).stdout  # fmt: skip
    return root, printed


def test_the_bar_shows_what_is_logged(shown):
    root, printed = shown
    last = next(line for line in reversed(printed.splitlines()) if line.startswith("Training"))
    assert "FLOPs" not in printed
    assert re.search(r"━+ 4/4 0:00:\d\d loss: ", last)
    rate, memory = (float(logged(root, name)[3]) for name in ("target_tokens_per_second", "memory_gb"))
    for part in (
        f"loss: {float(logged(root)[3]):.3f}",
        f"val: {float(logged(root, 'val_loss')[3]):.3f}",
        f"lr: {float(logged(root, 'lr')[3]):.1e}",
        f"tokens/s: {rate:,.0f}",
        f"wait: {float(logged(root, 'data_wait')[3]):.0%}",
        f"memory: {memory:.1f} GB",
        f"MFU: {float(logged(root, 'mfu')[3]):.0%}",
        "left: 0:00:00",
    ):
        assert part in last


def test_time_left_follows_from_the_steps_of_this_run():
    bar = RunProgressBar()
    bar._trainer = trainer = SimpleNamespace(global_step=10, estimated_stepping_batches=100)
    bar._started, bar._first_step = time.monotonic() - 30, 10
    assert bar.seconds_left(trainer) is None
    trainer.global_step = 20
    assert bar.seconds_left(trainer) == pytest.approx(3 * 80, rel=0.01)
    trainer.estimated_stepping_batches = float("inf")
    assert bar.seconds_left(trainer) is None


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_the_bar_and_its_figures_keep_to_one_line(width):
    bar = RunProgressBar()
    logged = dict.fromkeys(SHOWN, 1.0) | {"target_tokens_per_second": 123456.0, "lr": 3e-5, "memory_gb": 79.9}
    bar._trainer = trainer = SimpleNamespace(
        global_step=45678, estimated_stepping_batches=90000, callback_metrics=logged, progress_bar_metrics={}
    )
    bar._console = Console(width=width, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    bar._started = time.monotonic() - 36000
    shown = bar.get_metrics(trainer, None)
    assert list(shown)[:1] == ["loss"]
    assert len(shown) == {60: 1, 80: 2, 100: 4, 250: 8}[width]
    text = " · ".join(f"{name}: {value}" for name, value in shown.items())
    columns = [*bar.configure_columns(trainer), TextColumn(text)]
    progress = Progress(*columns, console=bar._console)
    progress.add_task("Training", total=90000, completed=45678)
    assert len(bar._console.render_lines(progress.get_renderable())) == 1


def test_answers_to_three_prompts_are_on_the_console_and_in_tensorboard(shown):
    root, printed = shown
    steps = re.split(r"Answers at step (\d+):\n", printed)[1:]
    assert steps[::2] == ["2", "4"]
    (events,) = (root / "lightning_logs" / "version_0").glob("events*")
    board = EventAccumulator(str(events)).Reload()
    for at, prompt in enumerate(PROMPTS):
        texts = board.Tensors(f"samples/{at}/text_summary")
        assert [event.step for event in texts] == [2, 4]
        for event, text in zip(texts, steps[1::2], strict=True):
            (written,) = event.tensor_proto.string_val
            asked, answer = written.decode().split("\n\n", 1)
            assert asked == f"**{prompt}**"
            assert f"  {prompt}\n    {answer.splitlines()[0] if answer else ''}" in text


def test_no_prompts_no_answers(model_folder, rows, tmp_path):
    own = ["--data.val_fraction", 0.4, "--trainer.max_steps", 1, "--trainer.val_check_interval", 1]
    assert "Answers at" not in fit(model_folder, rows, tmp_path, *own).stdout


def as_cell(kind: str) -> str:
    return kind.replace("|", "\\|").replace("$", "\\$")


def test_the_report_of_a_training(shown):
    root, _ = shown
    folder = root / "lightning_logs" / "version_0"
    text = (folder / "report.md").read_text("utf-8")
    assert re.findall("^#+ (.*)$", text, re.MULTILINE)[:3] == ["version_0", "Results", "Data"]
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert figures == ["loss.png", "kinds.png"]
    assert all((folder / figure).read_bytes().startswith(b"\x89PNG") for figure in figures)
    losses, validated = logged(root), logged(root, "val_loss")
    best = min(validated, key=lambda step: float(validated[step]))
    saved = [path.name for path in (root / "checkpoints").glob("best-*")]
    assert [name.split("-val")[0] for name in saved] == [f"best-step={best + 1}"], "one count of steps everywhere"
    table = cells(text)
    results = results_of(text)
    assert table["steps"] == ["4"]
    assert table["training loss, first and last"] == [f"{float(losses[0]):.4f}, {float(losses[3]):.4f}"]
    assert table["lowest validation loss"] == [f"{float(validated[best]):.4f} at step {best + 1}"]
    assert table["perplexity"] == [f"{float(logged(root, 'val_perplexity')[3]):,.4g}"]
    for kind in ("对联", "Summary", "a|b$c"):
        names = (f"val_{name}_of/{kind}" for name in ("accuracy", "eos_accuracy", "perplexity"))
        values = [logged(root, name).get(3) for name in names]
        shown = [f"{float(value):,.4g}" if value else "–" for value in values]
        assert results[as_cell(kind)][1:] == shown
    of_kinds = [int(results[kind][0]) for kind in ("对联", "Summary", "a\\|b\\$c")]
    assert results["rows"] == [str(sum(of_kinds))] == ["24"], "0.4 of 60 rows"
    assert table["lightning"] == [lightning_version]
    assert table["all"][0] == "60"
    shown = [heading for name, heading in HEADINGS.items() if name != "windows"]  # which only documents have
    assert table["kind"] == shown, "the last table with kinds is that of the rows"
    assert "\x1b" not in text
    saved = re.search(r"^## Configuration\n\n```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    assert yaml.safe_load(saved) == yaml.safe_load((folder / "config.yaml").read_text("utf-8"))


def test_the_reports_of_a_validation_and_a_test(model_folder, rows, tmp_path):
    common = ["--model.path", model_folder, "--data.val_files", rows, "--trainer.default_root_dir", tmp_path]
    for version, stage in enumerate(("validate", "test")):
        printed = run(
            "firefly-fit",
            stage,
            *common,
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
            *DECODING,
        ).stdout
        text = (tmp_path / "lightning_logs" / f"version_{version}" / "report.md").read_text("utf-8")
        table = results_of(text)
        name = {"validate": "val", "test": "test"}[stage]
        ((_, loss),) = logged(tmp_path, f"{name}_loss", version).items()
        assert table["loss"] == [f"{float(loss):,.4g}"]
        assert "steps" not in table
        shown = [line.split() for line in printed.splitlines()]
        assert ["loss", f"{float(loss):,.4g}"] in shown
        assert all([kind, *table[as_cell(kind)]] in shown for kind in ("对联", "Summary", "a|b$c"))
        assert not re.search(r"\d\.\d{8}", printed), "no list of all digits"
        columns = ["rows", "accuracy", "eos_accuracy", "perplexity"]
        columns += ["bleu", "chrf", "rouge_l"] if stage == "test" else []
        assert sorted(table["kind"]) == sorted(columns)
        assert [table[kind][0] for kind in ("对联", "Summary", "a\\|b\\$c")] == ["20"] * 3


def results_of(text: str) -> dict[str, list[str]]:
    """The cells of the tables before those of the data."""
    return cells(text.split("## Data")[0])


def cells(text: str) -> dict[str, list[str]]:
    """Of the tables of a report: by the first cell of a row, the others."""
    rows = [
        re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |"))
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {first: others for first, *others in rows}


def test_kinds_are_drawn_each_in_a_panel_of_its_own(tmp_path):
    draw_kinds({"对联": {10: 100.0, 20: 10.0}, "b$": {10: 10.0, 20: 100.0}}, tmp_path / "kinds.png")
    pixels = matplotlib.image.imread(tmp_path / "kinds.png")[..., :3]
    blue = np.abs(pixels - np.array([int(BLUE[at : at + 2], 16) for at in (1, 3, 5)]) / 255).max(-1) < 0.02
    half = blue.shape[1] // 2
    heights = []
    for panel in (blue[:, :half], blue[:, half:]):  # the one that ends higher comes first
        rows, columns = np.nonzero(panel)
        heights.append([rows[columns < columns.min() + 5].mean(), rows[columns > columns.max() - 5].mean()])
    (first_start, first_end), (second_start, second_end) = heights
    assert first_end < first_start, "up"
    assert second_end > second_start, "down"
    # On one scale, on which a hundredfold is as far up as down.
    assert first_start - first_end == pytest.approx(second_end - second_start, abs=6)
    assert first_start == pytest.approx(second_end, abs=6)


@pytest.mark.parametrize(("kinds", "width", "height"), [(1, 1, 1), (7, 4, 2), (12, 4, 2)])
def test_many_kinds_have_rows_of_panels_up_to_a_number(tmp_path, monkeypatch, kinds, width, height):
    monkeypatch.setattr(run_figures, "MOST_PANELS", 8)
    draw_kinds({f"K{at}": {1: at + 2.0, 2: at + 1.0} for at in range(kinds)}, tmp_path / "kinds.png")
    shape = matplotlib.image.imread(tmp_path / "kinds.png").shape
    assert shape[:2] == (round(150 * (1 + 1.9 * height)), round(150 * max(5, 2.6 * width)))


def test_metrics_of_a_run_that_left_none(tmp_path):
    assert read_metrics(Path(tmp_path / "version_0")) == {"train_loss": {}}


@pytest.mark.parametrize("name", ["first", "", "version_x", "版本", "version_3"])
def test_metrics_of_a_folder_of_any_name(tmp_path, name):
    """Only numbered ones are a chain of runs that were resumed."""
    folder = tmp_path / "exp" / name
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,train_loss,val_perplexity/对联\n3,2.5,\n4,2.25,9.0\n", "utf-8")
    assert read_metrics(folder) == {"train_loss": {3: 2.5, 4: 2.25}, "val_perplexity_of/对联": {4: 9.0}}


def test_metrics_behind_a_prefix(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,mine-train_loss,mine-val_perplexity_of/a/b\n0,2.5,4.0\n", "utf-8")
    assert read_metrics(tmp_path, "mine-") == {"train_loss": {0: 2.5}, "val_perplexity_of/a/b": {0: 4.0}}


def test_a_chain_of_runs_has_the_old_names_too(tmp_path):
    before = "step,train_loss,val_accuracy/NER\n0,3.0,\n1,2.9,0.5\n2,2.8,\n"
    for version, text in enumerate((before, "step,train_loss,val_accuracy_of/NER\n2,1.0,0.75\n")):
        folder = tmp_path / f"version_{version}"
        folder.mkdir()
        (folder / "metrics.csv").write_text(text)
    assert read_metrics(tmp_path / "version_1") == {
        "train_loss": {0: 3.0, 1: 2.9, 2: 1.0},
        "val_accuracy_of/NER": {1: 0.5, 2: 0.75},
    }
