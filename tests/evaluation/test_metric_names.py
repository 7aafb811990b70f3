"""Names of metrics: none is a folder of another, kinds are told apart, and MLflow takes them."""

import posixpath
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger

from firefly_lightning.evaluation.mlflow_names import LONGEST, keep_names, mlflow_name
from firefly_lightning.model.metric_names import of_kind, parted, renamed
from tests.support.small_runs import train

KINDS = st.text(max_size=120)


@given(KINDS)
def test_a_name_tells_its_kind(kind):
    assert parted(of_kind("val_perplexity", kind)) == ("val_perplexity", kind)
    assert parted("val_perplexity") == ("val_perplexity", None)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("val_perplexity/Couplet", "val_perplexity_of/Couplet"),
        ("test_bleu/对联/律诗", "test_bleu_of/对联/律诗"),
        ("val_perplexity_of/a/b", "val_perplexity_of/a/b"),
        ("val_loss", "val_loss"),
        ("lr-AdamW/pg1", "lr-AdamW/pg1"),
    ],
)
def test_names_of_before(before, now):
    assert renamed(before) == now


@given(st.one_of(KINDS, st.sampled_from(["", ".", "..", "...", "a/b", "QA: zh", "对联", "a" * 300, "诗" * 200])))
def test_mlflow_takes_every_kind(kind):
    """MLflow's own rules, of mlflow.utils.validation: characters, a path that is its own normal form, 250 letters."""
    name = mlflow_name(of_kind("val_perplexity", kind))
    assert re.fullmatch(r"[/\w.\- ]*", name)
    assert posixpath.normpath(name) == name
    assert not name.startswith(("/", ".."))
    assert len(name) <= 250
    assert name.count("/") == 1, "a kind is no folder of another"
    assert len(name.partition("/")[2].encode()) <= LONGEST


def test_kinds_stay_different_in_mlflow():
    kinds = ["对联", "律诗", "", "a/b", "a:b", "a_b", "a b", "NER", "诗" * 80, "诗" * 80 + "文", ".", ".."]
    names = {mlflow_name(of_kind("val_accuracy", kind)) for kind in kinds}
    assert len(names) == len(kinds)
    assert {mlflow_name(of_kind("val_accuracy", kind)) for kind in ("对联", "NER", "a b")} == {
        "val_accuracy_of/对联", "val_accuracy_of/NER", "val_accuracy_of/a b",
    }  # fmt: skip
    assert mlflow_name("lr-AdamW/pg1") == "lr-AdamW/pg1"
    assert mlflow_name("DeviceStatsMonitor.on_train_batch_start/cpu_percent (%)").startswith("DeviceStatsMonitor.on")


class Entity(NamedTuple):
    """What Lightning's logger makes of MLflow's class of this kind."""

    key: str
    value: float
    timestamp: int
    step: int


def test_mlflow_is_told_the_names_of_kinds(monkeypatch):
    """Of MLflow, a stand-in; tests/callbacks/test_loggers.py takes the real one where it is installed."""
    module = ModuleType("mlflow.entities")
    module.Metric = Entity
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", module)
    told = []
    logger, other = object.__new__(MLFlowLogger), DummyLogger()
    client = SimpleNamespace(log_batch=lambda **given: told.append(given))
    vars(logger).update(
        _prefix="mine", _log_batch_kwargs={"synchronous": True}, _initialized=True, _mlflow_client=client, _run_id="7"
    )
    monkeypatch.setitem(sys.modules["mlflow"].__dict__, "set_tracking_uri", lambda uri: None)
    keep_names([logger, other])
    assert not vars(other).get("log_metrics")
    logger.log_metrics({of_kind("val_accuracy", "对联"): torch.tensor(0.5), "epoch": 2, "text": "x"}, step=9)
    (given,) = told
    assert (given["run_id"], given["synchronous"]) == ("7", True)
    assert [(one.key, one.value, one.step) for one in given["metrics"]] == [
        ("mine-val_accuracy_of/对联", 0.5, 9), ("mine-epoch", 2.0, 9),
    ]  # fmt: skip


def test_the_name_of_no_metric_is_the_folder_of_another(tiny_folder, short_rows, short_val_rows, tmp_path):
    """As MLflow's file store needs it, which has a file for each."""
    logged = set()

    class Files(DummyLogger):
        def log_metrics(self, metrics, step=None):
            for name in metrics:
                file = tmp_path / "store" / mlflow_name(name)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as opened:
                    print(step, file=opened)
                logged.add(name)

    train(tiny_folder, short_rows, tmp_path, logger=Files(), max_steps=2, log_every_n_steps=1,
          data={"val_files": str(short_val_rows)}, val_check_interval=1)  # fmt: skip
    assert {"val_perplexity", "val_perplexity_of/对联", "val_eos_accuracy_of/QA: zh"} <= logged
