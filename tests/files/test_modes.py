"""Everything that is written can be read by whom the umask lets read."""

import os
import stat
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from firefly_lightning.files.atomic import new_folder
from tests.support.ranks import BIN


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in files}


def test_a_finished_folder_follows_the_umask(umask, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"1")
    mine.chmod(0o600)
    with new_folder(tmp_path / "out", []) as folder:
        (folder / "inner").mkdir()
        save_file({"a": torch.ones(2)}, folder / "inner" / "model.safetensors")
        (folder / "own.json").write_text("{}")
        (folder / "script").write_text("")
        (folder / "script").chmod(0o755)
        os.link(mine, folder / "linked")
    expected = 0o666 & ~umask
    found = modes(tmp_path / "out")
    assert found == {"inner/model.safetensors": expected, "own.json": expected, "script": 0o755, "linked": 0o600}


def test_all_that_commands_write_follows_the_umask(model_folder, rows_file, tmp_path):
    """Training with a LoRA and without, in both forms of checkpoints; exports, pruning, and a GGUF."""
    fit = [
        "firefly-fit",
        "fit",
        "--model.path",
        model_folder,
        "--data.train_files",
        rows_file,
        "--trainer.max_steps",
        1,
    ]
    fit += ["--data.batch_size", 8, "--model.warmup_steps", 0, "--trainer.accelerator", "cpu"]
    export = ["firefly", "export", "--checkpoint"]
    commands = [
        [*fit, "--trainer.default_root_dir", tmp_path / "whole"],
        [*fit, "--trainer.default_root_dir", tmp_path / "file", "--checkpoint.portable", "false"],
        [*fit, "--trainer.default_root_dir", tmp_path / "lora", "--model.adapter", "lora"],
        [*export, tmp_path / "whole", "--out", tmp_path / "exported", "--gguf", tmp_path / "x.gguf"],
        [*export, tmp_path / "lora", "--out", tmp_path / "adapter", "--adapter"],
        ["firefly", "prune", "--model", model_folder, "--corpus", rows_file, "--out", tmp_path / "pruned"],
    ]
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for program, *arguments in commands:
        subprocess.run([BIN / program, *map(str, arguments)], check=True, umask=0o027, env=own, capture_output=True)
    found = modes(tmp_path)
    assert {name for name, mode in found.items() if mode != 0o640} == set()
    assert {name.partition("/")[0] for name in found} >= {"whole", "file", "lora", "exported", "adapter", "pruned"}
    assert "x.gguf" in found
    assert sum(name.endswith(".safetensors") for name in found) >= 4
