"""Lightning's loggers, alone and together: a run is interrupted, resumed, validated and tested with each of them."""

import contextlib
import csv
import logging
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from firefly_lightning.model.metric_names import of_kind
from tests.support.helpers import run
from tests.support.predicting import DECODING
from tests.support.ranks import bare, lean
from tests.support.small_runs import KINDS

CSV, TENSORBOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
STEPS, STOP = 5, 2


def logger(class_path: str, **init_args: object) -> dict[str, object]:
    return {"class_path": class_path, "init_args": init_args}


LOGGERS = {
    "none named": (True, "run/lightning_logs/version_0"),
    "CSV of a name": (logger(CSV, save_dir="csv", name="exp", version="first"), "csv/exp/first"),
    "CSV without a version": (logger(CSV, save_dir="csv", name="exp", version=""), "csv/exp"),
    "CSV without a name": (logger(CSV, save_dir="csv", name=None), "csv/version_0"),
    "CSV with a prefix": (logger(CSV, save_dir="csv", prefix="mine"), "csv/lightning_logs/version_0"),
    "TensorBoard": (logger(TENSORBOARD, save_dir="events"), "run/lightning_logs/version_0"),
    "several": (
        [logger(TENSORBOARD, save_dir="events"), logger(CSV, save_dir="csv")], "csv/lightning_logs/version_0"),
}  # fmt: skip
"""By what they are: loggers, and the folder in which a run with them leaves its files, and goes on."""
OPTIONAL = {
    "W&B offline": logger("lightning.pytorch.loggers.WandbLogger", save_dir="wandb", offline=True),
    "MLflow in files": logger("lightning.pytorch.loggers.MLFlowLogger", save_dir="mlruns"),
    "MLflow in a database": logger("lightning.pytorch.loggers.MLFlowLogger", tracking_uri="sqlite:///mlflow.db"),
}  # fmt: skip
"""Loggers of the extra `loggers`; they leave files where the default loggers do."""


@pytest.fixture
def steps_of(tiny_folder, short_rows, short_val_rows, tmp_path, monkeypatch):
    """Makes the arguments of a command with loggers, in a folder of its own."""
    monkeypatch.setattr("firefly_lightning.cli.ends_on_signals", lambda program: contextlib.nullcontext())

    def make(loggers: object) -> list[object]:
        config = tmp_path / "loggers.yaml"
        config.write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
        return ["--config", config, "--model.path", tiny_folder, "--data.train_files", short_rows,
                "--data.val_files", short_val_rows, "--trainer.default_root_dir", tmp_path / "run",
                "--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.enable_progress_bar", "false",
                "--data.batch_size", 8]  # fmt: skip

    return make


def interrupt_and_resume(steps_of, loggers, cwd) -> Path:
    """Two runs with loggers: one that a signal ends, and one that goes on; both are of firefly-fit."""
    common = ["fit", *steps_of(loggers), "--trainer.max_steps", STEPS, "--model.warmup_steps", 1,
              "--trainer.val_check_interval", 2, "--trainer.check_val_every_n_epoch", "null"]  # fmt: skip
    stop = ["--trainer.callbacks", "tests.support.small_runs.Interrupting", "--trainer.callbacks.step", STOP]
    with lean(["fit"]):
        stopped = run("firefly-fit", *bare([*common, *stop]), check=False, cwd=cwd)
        assert stopped.returncode == 143, stopped.stderr
        return run("firefly-fit", *bare([*common, "--ckpt_path", "last"]), cwd=cwd)


def check_files(folder: Path, prefix: str = "") -> None:
    """Metrics of both runs in one file, the configuration, and a report of both."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row[f"{prefix}train_loss"]]
    assert logged == [*range(STEPS)]
    assert (folder / "config.yaml").is_file()
    report = (folder / "report.md").read_text("utf-8")
    assert f"| steps | {STEPS} |" in report
    for kind in KINDS:
        assert f"| {kind} |" in report


@pytest.mark.parametrize("name", LOGGERS)
def test_a_run_is_interrupted_and_goes_on(name, steps_of, tmp_path):
    loggers, folder = LOGGERS[name]
    interrupt_and_resume(steps_of, loggers, tmp_path)
    check_files(tmp_path / folder, "mine-" if "prefix" in name else "")
    assert len(list(tmp_path.rglob("metrics*.csv"))) == 1


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_run_with_an_optional_logger_alone(name, steps_of, tmp_path, monkeypatch):
    if torch.__version__.startswith("2.5."):
        pytest.skip("the oldest stack is without the extra loggers")
    loggers = OPTIONAL[name]
    for variable, value in {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_ENABLE_TELEMETRY": "false"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    interrupt_and_resume(steps_of, loggers, tmp_path)
    check_files(tmp_path / "run" / "lightning_logs" / "version_0")
    if name.startswith("MLflow"):
        check_mlflow(tmp_path, loggers)


def check_mlflow(folder: Path, loggers: dict) -> None:
    """Every kind has its metric under its own name; both runs are there."""
    from mlflow.tracking import MlflowClient

    uri = loggers["init_args"].get("tracking_uri", "").replace(":///", f":///{folder}/") or f"file:{folder / 'mlruns'}"
    client = MlflowClient(uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "lightning_logs"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    for kind in ("对联", "NER", "a_x2f_b", "QA_x3a_ zh"):
        name = of_kind("val_perplexity", kind)
        history = [len(client.get_metric_history(one.info.run_id, name)) for one in runs]
        assert sorted(history) == [1, 1], name


def test_tensorboard_has_every_kind(steps_of, tmp_path):
    interrupt_and_resume(steps_of, LOGGERS["TensorBoard"][0], tmp_path)
    events = EventAccumulator(str(tmp_path / "events" / "lightning_logs" / "version_0")).Reload()
    tags = events.Tags()["scalars"]
    assert {"train_loss", "val_perplexity", "val_perplexity_of/NER", "val_perplexity_of/对联"} <= set(tags)


def test_no_logger_is_said(steps_of, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        interrupt_and_resume(steps_of, False, tmp_path)
    assert "no report.md and no figures" in caplog.text
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("name", ["CSV of a name", "CSV without a version", "TensorBoard"])
def test_evaluations_have_a_report(stage, name, steps_of, tmp_path):
    loggers, folder = LOGGERS[name]
    run("firefly-fit", stage, *steps_of(loggers), *DECODING, cwd=tmp_path)
    folder = tmp_path / folder
    assert "| perplexity |" in (folder / "report.md").read_text("utf-8")
    assert (folder / "config.yaml").is_file()
    if stage == "test":
        assert len((folder / "predictions.jsonl").read_text("utf-8").splitlines()) == 20
