"""Which kind of checkpoints a run saves, in a script that has a trainer of its own."""

import copy
from pathlib import Path

import pytest
from lightning import Trainer

from firefly_lightning import FireflyDataModule, FireflyModule
from firefly_lightning.callbacks.checkpoints import LastCheckpoint
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from tests.support.helpers import forked

PLUGINS = {"none": None, "portable": AtomicCheckpointIO(), "own": AtomicCheckpointIO(portable=False)}

KINDS = {
    # What the plugin and the callback say, and what is saved.
    ("none", True): "folder",
    ("none", False): "own",
    ("portable", True): "folder",
    ("portable", False): "own",
    ("own", True): "own",
    ("own", False): "own",
}


def script(strategy: str, named: str, portable: bool, model: Path, rows: Path, root: Path) -> None:
    plugin = copy.copy(PLUGINS[named])
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=1,
        plugins=[plugin] if plugin else None,
        callbacks=[LastCheckpoint(portable=portable, dirpath=str(root))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FireflyModule(str(model), warmup_steps=1), FireflyDataModule(str(model), str(rows), batch_size=4))
    assert not plugin or vars(plugin) == vars(PLUGINS[named]), "the user's own plugin stays as it was"


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.parametrize(("named", "portable"), KINDS)
def test_checkpoints_are_portable_unless_plugin_or_callback_says_otherwise(
    strategy, named, portable, model_folder, rows_file, tmp_path
):
    process = forked(script, strategy, named, portable, model_folder, rows_file, tmp_path)
    process.join()
    assert process.exitcode == 0
    last = tmp_path / "last.ckpt"
    kind = "folder" if (last / "checkpoint.json").is_file() else "own"
    file_of_lightning = strategy == "auto" and named == "none"  # which has no other
    assert kind == ("own" if file_of_lightning else KINDS[named, portable])
    if strategy == "auto":
        assert last.is_file() == (kind == "own")
