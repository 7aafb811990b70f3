"""Data that is not this project's trains, validates and tests too, without what only ours can tell."""

import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.callbacks.prediction_writer import PredictionWriter
from firefly_lightning.callbacks.run_report import Report
from firefly_lightning.data.protocol import PlannedData, batches_of, data_of
from firefly_lightning.errors import FireflyError


@pytest.fixture
def ours(model_folder, rows_file, tmp_path) -> FireflyDataModule:
    data = FireflyDataModule(
        str(model_folder), str(rows_file), val_files=str(rows_file), batch_size=4, cache_dir=str(tmp_path / "cache")
    )
    data.prepare_data()
    return data


@pytest.fixture
def batches(ours) -> list:
    ours.setup("fit")
    return [ours.train[index] for index in range(3)]


class Plain(L.LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def run(root, model_folder, **arguments) -> tuple[FireflyModule, L.Trainer]:
    common = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "logger": True, "default_root_dir": root}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return FireflyModule(str(model_folder), warmup_steps=1, **arguments), L.Trainer(
        **common, **quiet, callbacks=[PredictionWriter(), Report()], log_every_n_steps=1
    )


def test_ours_says_what_it_has_before_it_is_set_up(ours):
    assert isinstance(ours, PlannedData)
    assert (ours.train, ours.val, ours.test) == (None, None, None)
    ours.setup("fit")
    assert batches_of(ours.train_dataloader()) is ours.train
    assert batches_of(ours.val_dataloader()) is ours.val


@pytest.mark.parametrize("wrapped", [True, False], ids=["data module", "loaders"])
def test_other_data_trains_and_is_evaluated(batches, model_folder, tmp_path, wrapped):
    module, trainer = run(tmp_path, model_folder)
    loader = DataLoader(batches, batch_size=None)
    data = {"datamodule": Plain(batches)} if wrapped else {"train_dataloaders": loader, "val_dataloaders": loader}
    trainer.fit(module, **data)
    assert data_of(trainer) is None
    assert trainer.global_step == 3
    assert module.encoder.prompt.separator == "</s></s>"
    validated = dict(trainer.callback_metrics)
    assert math.isfinite(validated["val_loss"])
    assert {name.partition("/")[2] for name in validated} == {"", "all"}, "kinds are not known"
    (tested,) = trainer.test(module, **({"datamodule": Plain(batches)} if wrapped else {"dataloaders": loader}))
    assert math.isclose(tested["test_loss"], validated["val_loss"], rel_tol=1e-6)


def test_a_bad_step_of_other_data_names_no_rows(batches, model_folder, tmp_path):
    module, trainer = run(tmp_path, model_folder)
    module.configure_model()
    with torch.no_grad():
        module.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FireflyError, match=r"step 0: loss nan.*Rows: not known"):
        trainer.fit(module, DataLoader(batches, batch_size=None))


def test_what_is_no_loader_has_no_batches():
    for other in (None, [], DataLoader([1])):
        assert batches_of(other) is None
    assert data_of(None) is None
