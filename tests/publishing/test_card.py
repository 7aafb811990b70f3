"""The card of an exported model: made from the checkpoint alone, read by the hub's own parser, true to the run."""

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.callbacks.run_figures import read_metrics
from firefly_lightning.checkpoints.history import HISTORY, MOST_POINTS, Curve, History
from firefly_lightning.export import export
from firefly_lightning.model.metric_names import parted
from firefly_lightning.publishing.card import write_card
from firefly_lightning.publishing.origin import origin_of
from tests.conftest import write_rows
from tests.support.helpers import fit

SHORT = ["--data.batch_size", 8, "--model.warmup_steps", 2, "--trainer.log_every_n_steps", 1]


@pytest.fixture(scope="module")
def val_rows(rows_file, tmp_path_factory) -> Path:
    lines = rows_file.read_text("utf-8").splitlines()[:9]
    return write_rows(tmp_path_factory.mktemp("val") / "val.jsonl", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def trained(model_folder, rows_file, val_rows, tmp_path_factory) -> Path:
    """A run of six steps, then resumed for four."""
    root = tmp_path_factory.mktemp("run")
    validated = ["--data.val_files", val_rows, "--trainer.val_check_interval", 3]
    for steps, more in ((6, []), (10, ["--ckpt_path", "last"])):
        fit(model_folder, rows_file, root, *SHORT, *validated, *more, "--trainer.max_steps", steps)
    return root


@pytest.fixture(scope="module")
def adapted(model_folder, rows_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapted")
    lora = ["--model.adapter.rank", 3, "--model.adapter.alpha", 6]
    fit(model_folder, rows_file, root, *SHORT, *lora, "--trainer.max_steps", 2)
    return root


def exported(root: Path, out: Path, **how) -> ModelCard:
    export(str(root / "checkpoints"), str(out), **how)
    return ModelCard.load(out / "README.md")


def tables(card: ModelCard) -> dict[str, list[list[str]]]:
    """The rows of each table, by the first heading of the table."""
    found, rows = {}, []
    for line in [*card.text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip().replace("\\", "") for cell in line.strip("|").split("|")])
        elif rows:
            found[rows[0][0]] = [*found.get(rows[0][0], []), *rows[2:]]
            rows = []
    return found


def test_a_card_tells_the_rows_the_figures_and_the_settings_of_the_run(trained, rows_file, val_rows, tmp_path):
    card = exported(trained, tmp_path / "chat-model")
    assert card.data.to_dict() == {
        "language": ["zh", "en"],
        "license": "bigscience-bloom-rail-1.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bloom", "firefly", "conversational"],
    }
    assert card.text.strip().startswith("<!-- Written by firefly export.")
    assert "# chat-model" in card.text
    assert "10 optimizer steps" in card.text
    kinds = Counter(json.loads(line)["kind"] for line in rows_file.read_text("utf-8").splitlines())
    found = tables(card)
    counted = {kind: rows for kind, rows, *others in found["kind"] if len(others) == 2}
    assert counted == {kind: str(count) for kind, count in kinds.items()} | {"all": "60"}
    metrics = read_metrics(trained / "lightning_logs" / "version_0")
    last = {name: values[max(values)] for name, values in metrics.items() if name.startswith("val_")}
    assert len(last) > 6
    of_kind = {row[0]: row[1:] for row in found["kind"] if len(row) > 4}
    assert {kind: row[0] for kind, row in of_kind.items()} == {
        kind: str(count)
        for kind, count in Counter(json.loads(line)["kind"] for line in val_rows.read_text().splitlines()).items()
    }
    for name, value in last.items():
        metric, kind = parted(name.removeprefix("val_"))
        shown = [cell for row in found["validation"] if row[0] == metric for cell in row[1:]]
        assert f"{value:,.4g}" in (of_kind[kind] if kind else shown), name
    settings = dict(row for row in found["setting"])
    assert settings["data.batch_size"] == "8"
    assert settings["trainer.max_steps"] == "10"
    assert settings["seed_everything"] == "0"
    assert settings["torch (package)"] == version("torch")
    assert float(settings["model.learning_rate"]) == 3e-5
    with Image.open(tmp_path / "chat-model" / "loss.png") as plot:
        assert min(plot.size) > 400
        assert len(set(plot.convert("RGB").getdata())) > 20


def test_nothing_of_the_machine_is_in_a_card(trained, model_folder, rows_file, tmp_path):
    text = exported(trained, tmp_path / "out").content
    assert model_folder.name in text
    assert rows_file.name in text
    for place in (model_folder.parent, rows_file.parent, trained, Path.home(), tmp_path):
        assert str(place) not in text


@pytest.mark.parametrize("kind", ["whole", "merged", "adapter"])
def test_the_snippet_of_a_card_runs(kind, trained, adapted, tmp_path, monkeypatch, capsys):
    card = exported(trained if kind == "whole" else adapted, tmp_path / "model", **{"adapter": kind == "adapter"})
    assert card.data.library_name == ("peft" if kind == "adapter" else "transformers")
    assert ("Trained was an adapter, LORA of rank 3" in card.text) == (kind != "whole")
    code = card.text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 7
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_weights_alone_have_a_card_without_figures(model_folder, rows_file, tmp_path):
    data = FireflyDataModule(str(model_folder), train_files=str(rows_file), batch_size=8)
    module = FireflyModule(str(model_folder), learning_rate=1e-4, warmup_steps=0, from_scratch=True)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    export(str(tmp_path / "weights.ckpt"), str(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "## Figures" not in card.text
    assert "## Data" not in card.text
    assert "1 optimizer steps" in card.text
    settings = dict(tables(card)["setting"])
    assert settings.items() >= {"model.learning_rate": "0.0001", "model.from_scratch": "True"}.items()
    assert settings["model.warmup_steps"] == "0"
    assert card.data.license is None
    assert not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    "forged",
    [
        {"callbacks": {HISTORY: {"sources": 3}}},
        {"callbacks": {HISTORY: {**History().state(), "curves": {"train_loss": [1, 2]}}}},
        {"callbacks": {HISTORY: {**History().state(), "kinds": {"A": {"rows": "many"}}}}},
        {"callbacks": {HISTORY: {**History().state(), "figures_step": float("inf")}}},
        {"callbacks": [1]},
        {"configuration": ": - {"},
        {"configuration": "[1, 2]"},
        {"configuration": "!!python/object/apply:os.system ['true']"},
        {"configuration": 7},
    ],
    ids=str,
)
def test_what_is_no_history_is_left_out(forged, tmp_path):
    origin = origin_of({"global_step": 5, **forged})
    weights = {"transformer.word_embeddings.weight": torch.zeros(7, 2)}
    write_card(tmp_path, "名 | name", weights, {"config.json": {"vocab_size": 7}}, origin)
    card = ModelCard.load(tmp_path / "README.md")
    assert "14 weights in float32 and a vocabulary of 7" in card.text
    assert "5 optimizer steps" in card.text
    assert "## Data" not in card.text
    assert not tables(card)


@pytest.mark.parametrize(
    ("own", "learned"),
    [
        ({}, "only the tokens of answers were learned, and of texts all"),
        ({"reference_log_probs": {}}, "learned was which of two answers is preferred"),
    ],
)
@pytest.mark.parametrize("figures", [{}, {"val_loss": 0.5}])
def test_a_card_says_what_was_learned(own, learned, figures, tmp_path):
    """Whether it was validated or not."""
    history = {**History().state(), "figures": figures, "figures_step": 5}
    origin = origin_of({"global_step": 5, "callbacks": {HISTORY: history}, **own})
    weights = {"transformer.word_embeddings.weight": torch.zeros(7, 2)}
    write_card(tmp_path, "name", weights, {"config.json": {"vocab_size": 7}}, origin)
    text = ModelCard.load(tmp_path / "README.md").text
    assert f"5 optimizer steps; {learned}." in text
    assert ("the loss is the mean of pairs" in text) == bool(own and figures)


def test_a_long_curve_is_thinned_to_means():
    count = 5 * MOST_POINTS + 7
    whole, halves = Curve(), Curve()
    for step in range(1, count + 1):
        whole.add(step, float(step))
        halves.add(step, float(step))
        if step % 999 == 0:
            halves = Curve.of(json.loads(json.dumps(halves.state())))
    assert MOST_POINTS / 2 <= len(whole.points) < MOST_POINTS
    assert halves.points == whole.points
    last = 0
    for step, value in whole.points.items():
        assert value == pytest.approx((last + 1 + step) / 2), "the mean of the steps since the last point"
        last = step
    assert count - last < 8
