"""Every callback that Lightning ships: a run with it goes on after an interruption, or it is refused."""

from datetime import timedelta

import lightning.pytorch.callbacks as shipped
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger

from firefly_lightning import FireflyError
from firefly_lightning.interrupts import Terminated
from firefly_lightning.strategies import FSDP2Strategy
from firefly_lightning.strategies.unsuited_callbacks import REASONS, check_callbacks
from tests.support.helpers import one_line
from tests.support.helpers import run as command
from tests.support.small_runs import Interrupting, train

STEPS, STOP = 6, 3


class FreezingEmbeddings(shipped.BaseFinetuning):
    """As a user writes one; the model is there once it is asked for."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        pl_module.configure_model()
        self.freeze(pl_module.model.transformer.word_embeddings_layernorm)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        pass


class Quiet(ProgressBar):
    def enable(self) -> None:
        pass

    def disable(self) -> None:
        pass


class Writing(shipped.BasePredictionWriter):
    def write_on_epoch_end(self, *args) -> None:
        pass


SUITED = {
    "Callback": lambda root: shipped.Callback(),
    "Checkpoint": lambda root: shipped.Checkpoint(),
    "BaseFinetuning": lambda root: FreezingEmbeddings(),
    "BasePredictionWriter": lambda root: Writing("epoch"),
    "DeviceStatsMonitor": lambda root: shipped.DeviceStatsMonitor(cpu_stats=True),
    "EarlyStopping": lambda root: shipped.EarlyStopping("val_loss", patience=9),
    "GradientAccumulationScheduler": lambda root: shipped.GradientAccumulationScheduler({0: 1}),
    "LambdaCallback": lambda root: shipped.LambdaCallback(on_train_start=lambda trainer, module: None),
    "LearningRateMonitor": lambda root: shipped.LearningRateMonitor(log_momentum=True, log_weight_decay=True),
    "ModelCheckpoint": lambda root: shipped.ModelCheckpoint(root / "own", save_top_k=-1, every_n_train_steps=2),
    "ModelSummary": lambda root: shipped.ModelSummary(max_depth=2),
    "OnExceptionCheckpoint": lambda root: shipped.OnExceptionCheckpoint(root, filename="exception"),
    "ProgressBar": lambda root: Quiet(),
    "RichModelSummary": lambda root: shipped.RichModelSummary(),
    "RichProgressBar": lambda root: shipped.RichProgressBar(),
    "ThroughputMonitor": lambda root: shipped.ThroughputMonitor(lambda batch: len(batch["rows"])),
    "Timer": lambda root: shipped.Timer(timedelta(days=1)),
    "TQDMProgressBar": lambda root: shipped.TQDMProgressBar(),
    "WeightAveraging": lambda root: shipped.WeightAveraging(),
    "EMAWeightAveraging": lambda root: shipped.EMAWeightAveraging(decay=0.5),
}
"""By its name, a callback that a run can have."""

REFUSED = {
    "BackboneFinetuning": (lambda: shipped.BackboneFinetuning(), "does not have"),
    "BatchSizeFinder": (lambda: shipped.BatchSizeFinder(), "data.batch_size is the rows of a step"),
    "GradientAccumulationScheduler": (
        lambda: shipped.GradientAccumulationScheduler({0: 4}),
        "data.batch_size says how many",
    ),
    "LearningRateFinder": (lambda: shipped.LearningRateFinder(), "would not reach the schedule"),
    "ModelPruning": (lambda: shipped.ModelPruning("l1_unstructured", amount=0.5), "firefly prune"),
    "SpikeDetection": (lambda: shipped.SpikeDetection(), "cannot be resumed"),
    "StochasticWeightAveraging": (lambda: shipped.StochasticWeightAveraging(1e-2), "WeightAveraging"),
}
"""By its name, a callback that is refused, and a part of the reason."""

IN_BARS = ("RichProgressBar", "TQDMProgressBar", "ProgressBar", "RichModelSummary", "ModelSummary")


def test_every_callback_of_lightning_is_tried():
    assert {*SUITED, *REFUSED} == set(shipped.__all__)
    assert {type(make()) for make, _ in REFUSED.values()} >= set(REASONS) - {shipped.WeightAveraging}


def run(model, rows, root, callbacks, val_rows, **more):
    shown = [callback for callback in callbacks if type(callback).__name__ in IN_BARS or isinstance(callback, Quiet)]
    return train(
        model, rows, root, callbacks, max_steps=STEPS, data={"val_files": str(val_rows), "micro_batch_size": 8},
        logger=CSVLogger(root), val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in shown),
        enable_model_summary=any("Summary" in type(callback).__name__ for callback in shown), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_folder, short_rows, short_val_rows, tmp_path_factory):
    return run(tiny_folder, short_rows, tmp_path_factory.mktemp("whole"), [], short_val_rows)


@pytest.mark.parametrize("name", SUITED)
def test_a_run_with_it_is_interrupted_and_goes_on(name, whole, tiny_folder, short_rows, short_val_rows, tmp_path):
    make = SUITED[name]
    parts = tiny_folder, short_rows, tmp_path
    with pytest.raises(Terminated):
        run(*parts, [make(tmp_path), Interrupting(STOP)], short_val_rows)
    last = tmp_path / "checkpoints" / "last.ckpt"
    resumed = run(*parts, [make(tmp_path)], short_val_rows, ckpt_path=last)
    if name == "BaseFinetuning":
        whole = run(*parts, [make(tmp_path)], short_val_rows)
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > STOP}
    assert [step for step in resumed.validated if step > STOP + 1] == [6]


def test_averages_go_on_too(tiny_folder, short_rows, short_val_rows, tmp_path):
    """What is exported is the average, in a run that was interrupted and in one that was not."""
    from safetensors.torch import load_file

    averages = []
    for stops in ([], [Interrupting(STOP)]):
        root = tmp_path / str(len(stops))
        parts = tiny_folder, short_rows, root
        last = root / "checkpoints" / "last.ckpt"
        if stops:
            with pytest.raises(Terminated):
                run(*parts, [SUITED["EMAWeightAveraging"](root), *stops], short_val_rows)
        run(*parts, [SUITED["EMAWeightAveraging"](root)], short_val_rows, ckpt_path=last if stops else None)
        averages.append(load_file(last / "model-0-0.safetensors"))
    run(tiny_folder, short_rows, tmp_path / "plain", [], short_val_rows)
    plain = load_file(tmp_path / "plain" / "checkpoints" / "last.ckpt" / "model-0-0.safetensors")
    for name, value in averages[0].items():
        assert torch.equal(averages[1][name], value), name
        assert not torch.equal(plain[name], value), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name, tiny_folder, short_rows, short_val_rows, tmp_path):
    make, says = REFUSED[name]
    with pytest.raises(FireflyError, match=says) as raised:
        run(tiny_folder, short_rows, tmp_path, [make()], short_val_rows)
    assert "\n" not in str(raised.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
def test_finders_are_refused_in_one_line(name, stage, tiny_folder, short_rows, tmp_path):
    result = command(
        "firefly-fit", stage, "--model.path", tiny_folder, "--data.train_files", short_rows, "--data.val_fraction", 0.2,
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path, "--trainer.callbacks", name,
        "--trainer.max_steps", 2, check=False,
    )  # fmt: skip
    assert one_line(result).startswith(f"trainer.callbacks: {name} cannot be used here: ")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_averages_of_sharded_weights_are_refused(name, tmp_path):
    from types import SimpleNamespace

    trainer = SimpleNamespace(strategy=FSDP2Strategy(), callbacks=[SUITED[name](tmp_path)])
    with pytest.raises(FireflyError, match="this strategy shards them"):
        check_callbacks(trainer)


def test_what_ails_the_detection_of_spikes():
    """Not mended yet in Lightning: its state is loaded into an attribute that it does not have."""
    state = shipped.SpikeDetection().state_dict()
    with pytest.raises(AttributeError, match="running"):
        shipped.SpikeDetection().load_state_dict(state)
