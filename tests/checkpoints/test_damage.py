"""Checkpoints in which a byte has changed, and checkpoints that somebody else has written: found, named, never run."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from firefly_lightning.checkpoints import own_form, torch_file
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError
from firefly_lightning.export import export
from firefly_lightning.huggingface import describe
from firefly_lightning.prompt import PRESETS
from tests.support.helpers import raised_line

VALUES = [None, True, -1, 1.5, "x", [], [1], {}, {"a": 1}, {"a": {}}]


@pytest.fixture(scope="module")
def contents(bloom, tokenizer) -> dict:
    """What Lightning saves of a run, as far as anything here reads it."""
    named = {f"model.{name}": weight for name, weight in bloom.named_parameters()}
    optimizer = torch.optim.AdamW([weight.detach().clone().requires_grad_() for weight in named.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.0",
        "loops": {"fit_loop": {}}, "callbacks": {}, "lr_schedulers": [{"last_epoch": 1}],
        "state_dict": {f"model.{name}": weight for name, weight in bloom.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()], "optimizer_parameters": [list(named)],
        "hugging_face": describe(bloom.config, tokenizer, PRESETS["firefly"]),
        "FireflyDataModule": {"step": 1, "plan": {}}, "configuration": "model: {}\n",
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(contents, tmp_path_factory) -> dict[str, Path]:
    """By form: a portable checkpoint, one file, and a folder in an engine's own form."""
    root = tmp_path_factory.mktemp("saved")
    AtomicCheckpointIO().save_checkpoint(contents, root / "portable")
    AtomicCheckpointIO(portable=False).save_checkpoint(contents, root / "file")
    (root / "own" / "inner").mkdir(parents=True)
    kept = {key: value for key, value in contents.items() if key not in ("state_dict", "optimizer_states")}
    torch.save(kept | {"written_by": {"engine": "native", "digests": True}}, root / "own" / "trainer.ckpt")
    (root / "own" / "inner" / "shard.pt").write_bytes(bytes(range(256)) * 20)
    names = own_form.files_of(root / "own")
    own_form.finish_own(root / "own", {name: own_form.entry_of(root / "own" / name) for name in names})
    return {name: root / name for name in ("portable", "file", "own")}


READERS = {
    "portable": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "file": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "own": own_form.read_own,
}


@pytest.fixture(params=READERS)
def form(request) -> str:
    return request.param


@pytest.fixture
def copy(saved, form, tmp_path) -> Path:
    source, target = saved[form], tmp_path / "last.ckpt"
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def files_in(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def test_what_was_saved_is_read(contents, form, copy):
    read = READERS[form](copy)
    assert read["global_step"] == 1
    for name, weight in read.get("state_dict", {}).items():
        assert torch.equal(weight, contents["state_dict"][name])


def test_a_changed_byte_is_found_wherever_it_is(form, copy):
    """At a hundred places of every file, and at each of the last ones, where an archive has its table."""
    for file in files_in(copy):
        whole = file.read_bytes()
        places = {*range(0, len(whole), len(whole) // 100 + 1), *range(len(whole))[-100:]}
        for place in sorted(places):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(FireflyError) as raised:
                READERS[form](copy)
            assert raised_line(raised).startswith(f"{file}: "), place
            assert "damaged" in str(raised.value)
        file.write_bytes(whole)
    READERS[form](copy)


def test_a_cut_empty_longer_zeroed_or_missing_file_is_found(form, copy):
    for file in files_in(copy):
        whole = file.read_bytes()
        others = [whole[:-1], whole[:-40], whole[: len(whole) // 2], whole[:20], b"", whole + b"\0", bytes(len(whole))]
        for other in (*others, None):
            file.unlink()
            if other is not None:
                file.write_bytes(other)
            with pytest.raises(FireflyError) as raised:
                READERS[form](copy)
            assert raised_line(raised).startswith(f"{file}: ")
            file.write_bytes(whole)


def test_export_finds_it_too(saved, tmp_path):
    for form, name in (("portable", "model-0-0.safetensors"), ("file", None)):
        copy = tmp_path / form
        shutil.copytree(saved[form], copy) if name else shutil.copy(saved[form], copy)
        export(str(copy), str(tmp_path / f"{form}-whole"))
        file = copy / name if name else copy
        whole = file.read_bytes()
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FireflyError, match="damaged, its contents have changed"):
            export(str(copy), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_file_with_its_digest_is_any_other_file_of_pytorch(contents, saved):
    read = torch.load(saved["file"], weights_only=True)
    assert read.keys() == contents.keys()
    assert load_file(saved["file"], "cpu").keys() == contents.keys()


def test_a_file_is_digested_once_until_it_changes(saved, tmp_path, monkeypatch):
    """Also where the change leaves its size and the time that programs can set."""
    path = Path(shutil.copy(saved["file"], tmp_path / "a.ckpt"))
    digested = []
    monkeypatch.setattr(
        torch_file, "_comment", lambda *file, made=torch_file._comment: digested.append(1) or made(*file)
    )
    for _ in range(3):
        load_file(path, "cpu")
    assert len(digested) == 1
    status, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(FireflyError, match="damaged, its contents have changed"):
            load_file(path, "cpu")
    assert len(digested) == 3


def test_a_file_without_a_digest_is_read(contents, tmp_path):
    """One of an older release, or of Lightning's own plugin."""
    torch.save(contents, tmp_path / "a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1


@pytest.mark.parametrize("form", ["portable"], indirect=True)
def test_the_index_of_another_checkpoint_of_the_run_is_found(contents, copy, tmp_path):
    raised = {weight.data_ptr(): weight + 1 for weight in contents["state_dict"].values()}  # tied weights stay tied
    weights = {name: raised[weight.data_ptr()] for name, weight in contents["state_dict"].items()}
    AtomicCheckpointIO().save_checkpoint(contents | {"state_dict": weights}, tmp_path / "later")
    names = [file.name for file in files_in(copy) if file.read_bytes() != (tmp_path / "later" / file.name).read_bytes()]
    assert names == ["checkpoint.json", "model-0-0.safetensors", "model.safetensors.index.json"]
    for name in names:
        shutil.copytree(copy, tmp_path / name)
        shutil.copy(tmp_path / "later" / name, tmp_path / name / name)
        with pytest.raises(FireflyError, match="damaged"):
            export(str(tmp_path / name), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def listed(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}


def forge(folder: Path, change=lambda manifest: None, **files: dict) -> None:
    """Writes files of contents, and a manifest that agrees with them, as somebody would who knows the form."""
    for name, held in files.items():
        torch.save(held, folder / f"{name}.ckpt")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["xxh3_128"]
    manifest["files"] = {name: listed(folder / name) for name in manifest["files"] if (folder / name).is_file()}
    change(manifest)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (folder / "checkpoint.json").write_text(json.dumps(manifest | {"xxh3_128": digest}, indent=1) + "\n")


ENTRY = {"bytes": 1, "xxh3_128": ""}

MANIFESTS = {
    "lists '../x', which is no file of its folder": lambda manifest: manifest["files"].update({"../x": ENTRY}),
    "lists '/etc/passwd', which is no file": lambda manifest: manifest["files"].update({"/etc/passwd": ENTRY}),
    "lists 'a/b', which no checkpoint has": lambda manifest: manifest["files"].update({"a/b": ENTRY}),
    "lists 'mine.txt', which no checkpoint has": lambda manifest: manifest["files"].update({"mine.txt": ENTRY}),
    "does not list trainer.ckpt": lambda manifest: manifest["files"].pop("trainer.ckpt"),
    "does not list model.safetensors.index": lambda manifest: manifest["files"].pop("model.safetensors.index.json"),
    "does not list optimizer-0-0.safetensors": lambda manifest: manifest["files"].pop("optimizer-0-0.safetensors"),
    "is no list of files": lambda manifest: manifest.update(files=[]),
    "is no list of files with their sizes": lambda manifest: manifest["files"]["trainer.ckpt"].pop("bytes"),
    "is of format 'x'; this release reads 1": lambda manifest: manifest.update(format="x"),
    "is of format None": lambda manifest: manifest.pop("format"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["portable"], indirect=True)
@pytest.mark.parametrize("message", MANIFESTS)
def test_a_manifest_is_checked_before_it_is_used(copy, message):
    forge(copy, MANIFESTS[message])
    with pytest.raises(FireflyError, match=message) as raised:
        AtomicCheckpointIO().load_checkpoint(copy)
    assert raised_line(raised).startswith(f"{copy / 'checkpoint.json'}: ")


@pytest.mark.parametrize("form", ["portable"], indirect=True)
def test_a_checkpoint_without_its_optimizer_is_found(copy):
    (copy / "optimizer-0-0.safetensors").unlink()
    forge(copy)
    with pytest.raises(FireflyError, match="is not of the other files of this checkpoint"):
        AtomicCheckpointIO().load_checkpoint(copy)


@pytest.mark.parametrize("form", ["portable"], indirect=True)
def test_every_kind_of_value_in_every_key_is_taken_or_refused_in_a_line(copy):
    """What is refused is refused before it is used; the configuration is only shown, and may be anything."""
    trainer = torch.load(copy / "trainer.ckpt", weights_only=True)
    refused: dict[str, int] = dict.fromkeys(trainer, 0)
    for key in trainer:
        for value in VALUES:
            forge(copy, trainer=trainer | {key: value})
            with contextlib.suppress(FireflyError):
                AtomicCheckpointIO().load_checkpoint(copy)
                continue
            refused[key] += 1
    assert refused.pop("configuration") == 0
    assert all(number >= len(VALUES) - 4 for number in refused.values()), refused


DESCRIPTIONS = {
    "its hugging_face is dict, not files by name with fields of config.json": {"config.json": []},
    "its tokenizer.json is dict, not str": {"tokenizer.json": {}},
    "its prompt_format.json is int": {"prompt_format.json": 3},
    "n_layer is 10000000, not a whole number from 1 to 10,000": {"config.json": {"n_layer": 10**7}},
    "has n_layer 9999|lacks transformer.h.": {"config.json": {"n_layer": 9999}},
    "hidden_size is -1, not": {"config.json": {"hidden_size": -1}},
    "hidden_size 17 is no multiple of n_head 2": {"config.json": {"hidden_size": 17}},
    "n_head is a dict, not": {"config.json": {"n_head": {}}},
    "top_k is -5, not": {"generation_config.json": {"top_k": -5}},
}


@pytest.mark.parametrize("form", ["portable"], indirect=True)
@pytest.mark.parametrize("message", DESCRIPTIONS)
def test_the_model_that_is_described_is_checked_before_it_is_built(copy, message, tmp_path):
    trainer = torch.load(copy / "trainer.ckpt", weights_only=True)
    for name, value in DESCRIPTIONS[message].items():
        own = trainer["hugging_face"][name]
        trainer["hugging_face"][name] = own | value if value and isinstance(value, dict) else value
    forge(copy, trainer=trainer)
    with pytest.raises(FireflyError, match=message) as raised:
        export(str(copy), str(tmp_path / "out"))
    raised_line(raised)


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_a_checkpoint_is_run(saved, form, copy, tmp_path):
    ran = tmp_path / "ran"
    for file in [file for file in files_in(copy) if file.suffix in (".ckpt", ".pt") or form == "file"]:
        torch.save({"state_dict": Touching(ran), "global_step": 1}, file)
        if form == "portable":
            forge(copy)
        elif form == "own":
            names = own_form.files_of(copy)
            own_form.finish_own(copy, {name: own_form.entry_of(copy / name) for name in names})
        with pytest.raises(FireflyError, match="which could run code"):
            READERS[form](copy) if file.name != "shard.pt" else load_file(file, "cpu")
    assert not ran.exists()


def test_tensors_beside_a_portable_checkpoint_are_none_of_it(saved, tmp_path):
    copy = shutil.copytree(saved["portable"], tmp_path / "last.ckpt")
    shutil.copy(copy / "model-0-0.safetensors", copy / "mine.safetensors")
    AtomicCheckpointIO().load_checkpoint(copy)
    shutil.copy(copy / "model-0-0.safetensors", copy / "model-1-0.safetensors")
    with pytest.raises(FireflyError, match=r"does not list model-1-0\.safetensors"):
        AtomicCheckpointIO().load_checkpoint(copy)
