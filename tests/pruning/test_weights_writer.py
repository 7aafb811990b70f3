import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import BloomForCausalLM

from firefly_lightning.errors import FireflyError
from firefly_lightning.pruning import steps
from firefly_lightning.pruning import weights_writer as pruning_writer
from firefly_lightning.pruning.command import prune
from tests.support.helpers import PATIENCE, ROOT, share_blocks
from tests.support.pruning_fixtures import EMBEDDING, reviews, save_weights, small_bloom, weights, write

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_bloom(tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return [str(write(tmp_path_factory.mktemp("corpus") / "corpus.txt", "\n".join(reviews()[1000:1020])))]


def gathered(folder: Path, out: Path, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor of the large vocabulary, found by the strings of the tokens."""
    large, small = (Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab() for path in (folder, out))
    return tensor[[large[token] for token in sorted(small, key=small.__getitem__)]]


def as_bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_head(tensors):
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


def in_bfloat16(tensors):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def mixed(tensors):
    wide = "transformer.h.1.input_layernorm.weight"
    return {**in_bfloat16(tensors), wide: tensors[wide].double(), "transformer.ln_f.bias": torch.ones(3).half()}


@pytest.mark.parametrize("change", [dict, as_bare, with_head, in_bfloat16, mixed])
@pytest.mark.parametrize(("suffix", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_all_forms_of_weights_give_the_same(copied, corpus, tmp_path, change, suffix, shards):
    tensors = change(weights(copied))
    save_weights(tensors, copied, suffix, shards)
    prune(str(copied), str(tmp_path / "out"), corpus, verify=corpus[0] if change is as_bare else None)
    expected = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    (embedding,) = {EMBEDDING, EMBEDDING.removeprefix("transformer.")} & expected.keys()
    expected[embedding] = gathered(copied, tmp_path / "out", expected[embedding])
    result = weights(tmp_path / "out")
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_untied_head_is_gathered_too(copied, corpus, tmp_path):
    tensors = {**weights(copied), HEAD: torch.rand(1000, 16)}
    save_weights(tensors, copied, "safetensors", 2)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    prune(str(copied), str(tmp_path / "out"), corpus, verify=corpus[0])
    result = weights(tmp_path / "out")
    assert torch.equal(result[HEAD], gathered(copied, tmp_path / "out", tensors[HEAD]))
    assert torch.equal(result[EMBEDDING], gathered(copied, tmp_path / "out", tensors[EMBEDDING]))
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())["parameters"]
    assert report["before"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["after"] == sum(tensor.numel() for tensor in result.values())


def test_a_head_that_is_the_embedding_again_is_dropped(copied, corpus, tmp_path):
    save_weights(with_head(weights(copied)), copied, "safetensors", 2)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    prune(str(copied), str(tmp_path / "out"), corpus, verify=corpus[0])
    assert HEAD not in weights(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_many_files_and_an_index(model, corpus, tmp_path, monkeypatch):
    prune(str(model), str(tmp_path / "one"), corpus)
    monkeypatch.setattr(pruning_writer, "ONE_FILE_BYTES", 20_000)
    prune(str(model), str(tmp_path / "many"), corpus)
    assert_same_model(tmp_path / "one", tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) == 2  # what depends on the vocabulary, and the rest
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(tmp_path / "one").values())


def test_a_mistake_ends_the_copying(model, tmp_path, monkeypatch):
    """Weights are copied while it is found out which tokens stay, which may fail."""
    monkeypatch.setattr(pruning_writer, "ONE_FILE_BYTES", 20_000)
    begun = threading.Event()

    def failing(*args):
        assert begun.wait(60)
        raise FireflyError("no tokens")

    def endless(path, parts):
        path.write_bytes(b"half")
        begun.set()
        yield from itertools.repeat(1)

    monkeypatch.setattr(steps, "plan_tokenizer", failing)
    monkeypatch.setattr(pruning_writer, "write_file", endless)
    with pytest.raises(FireflyError, match="no tokens"):
        prune(str(model), str(tmp_path / "out"), tokenizer="anything")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [dict, as_bare])
def test_files_in_which_nothing_changes_are_linked(copied, corpus, tmp_path, change, capsys):
    save_weights(change(weights(copied)), copied, "safetensors", 3)
    cached = in_hub_cache(copied, tmp_path)
    prune(str(cached), str(tmp_path / "out"), corpus, link=True, verify=corpus[0])
    prune(str(cached), str(tmp_path / "copied"), corpus)
    assert_same_model(tmp_path / "out", tmp_path / "copied")
    linked = json.loads((tmp_path / "out" / "pruning.json").read_text())["linked"]
    assert len(linked) == 2
    warning, printed = "what is written into one changes both models", capsys.readouterr().out
    assert printed.count(warning) == 1
    for name, file in linked.items():
        assert f"{name} is {file}" in printed
        assert (tmp_path / "out" / name).samefile(file)
        assert not (tmp_path / "out" / name).is_symlink()  # it outlives the cache
        assert not (tmp_path / "copied" / name).samefile(file)
    assert "linked" not in json.loads((tmp_path / "copied" / "pruning.json").read_text())


def in_hub_cache(folder: Path, tmp_path: Path) -> Path:
    """A folder as huggingface_hub keeps it: links to files that are named otherwise."""
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(folder.iterdir()):
        blob = file.rename(folder / f"blob{number}")
        (tmp_path / "snapshot" / file.name).symlink_to(blob)
    return tmp_path / "snapshot"


def assert_same_model(one: Path, other: Path) -> None:
    models = [BloomForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(("suffix", "shards"), [("safetensors", 1), ("bin", 3)])
def test_nothing_to_link(copied, corpus, tmp_path, suffix, shards):
    save_weights(weights(copied), copied, suffix, shards)
    with pytest.raises(FireflyError, match=f"--link: every file of {copied} holds rows .* leave --link out"):
        prune(str(copied), str(tmp_path / "out"), corpus, link=True)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_link(copied, corpus, tmp_path, monkeypatch):
    save_weights(weights(copied), copied, "safetensors", 3)

    def refuse(file, name):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(file), None, str(name))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FireflyError, match=r"--link: .*-of-00003.safetensors cannot be linked .*Invalid cross-device"):
        prune(str(copied), str(tmp_path / "out"), corpus, link=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_blocks_of_what_stays_are_shared(copied, corpus, tmp_path, monkeypatch):
    """All whole blocks but those of the embedding, which begins its file as in the files of Bloom's authors."""
    tensors = weights(copied)
    (copied / "model.safetensors").unlink()
    wide = {"word_embeddings.weight": tensors.pop(EMBEDDING), "x.weight": torch.rand(6400, 16)}
    save_file(wide, copied / "a.safetensors")
    save_file(tensors, copied / "b.safetensors")
    index = dict.fromkeys(tensors, "b.safetensors") | dict.fromkeys(wide, "a.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shared = share_blocks(monkeypatch)
    prune(str(copied), str(tmp_path / "out"), corpus)
    kept = weights(tmp_path / "out")
    assert torch.equal(kept["x.weight"], wide["x.weight"])
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    size = sum(tensor.nbytes for name, tensor in kept.items() if "word_embeddings.weight" not in name)
    assert size - 4 * 4096 < sum(map(len, shared)) <= size


FULL_DISK = """
import resource, signal, sys
from firefly_lightning.errors import one_line_errors
from firefly_lightning.pruning.command import prune
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
with one_line_errors("firefly"):
    prune(sys.argv[1], sys.argv[2], [sys.argv[3]])
"""


def test_full_disk_leaves_nothing(model, corpus, tmp_path):
    largest = (model / "model.safetensors").stat().st_size // 2  # room for the tokenizer, not for the weights
    result = script(FULL_DISK, model, tmp_path / "out", corpus[0], largest)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"firefly: error: {tmp_path / 'out'}: File too large"
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


PEAK_MEMORY = """
import sys
from pathlib import Path
from firefly_lightning.pruning.command import prune
prune(sys.argv[1], sys.argv[2], [sys.argv[3]])
status = Path("/proc/self/status").read_text()
print("peak", int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_memory_stays_small(copied, corpus, tmp_path, suffix):
    hidden, vocabulary = 2048, 8192
    embedding = torch.zeros(vocabulary, hidden)
    big = {f"transformer.h.{index}.mlp.dense_h_to_4h.weight": torch.zeros(4 * hidden, hidden) for index in range(21)}
    save_weights({EMBEDDING: embedding, **big}, copied, suffix, 2)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary, "hidden_size": hidden}))
    del big
    try:
        result = script(PEAK_MEMORY, copied, tmp_path / "out", corpus[0])
    finally:
        size = sum(file.stat().st_size for file in copied.glob(f"*.{suffix}"))
        shutil.rmtree(copied)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    bound = embedding.nbytes + 2**30  # all of its rows could stay
    assert size > 1.2 * bound  # so that holding the model, or the pages of its files, would show
    assert int(result.stdout.split()[-1]) < bound, result.stdout + result.stderr


def script(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
