"""A hub, with the real code of huggingface_hub, datasets and the commands: pushed, read back, cut off and refused."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BloomForCausalLM

from tests.conftest import ANSWERS
from tests.support.helpers import ROOT, one_line, run
from tests.support.hub import READER, WRITER, running_hub
from tests.support.ranks import BIN
from tests.support.readme import DOCS, commands, read_blocks


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


def ask(hub, home, name, *args, token=WRITER, check=True, cwd=ROOT, **environment):
    """Runs a command in a process of its own that knows this hub alone."""
    told = hub.environment(home, token) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [str(BIN / name), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=told)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    assert WRITER not in result.stdout + result.stderr
    return result


def answer(result) -> str:
    return result.stdout.strip()


def chat(*args):
    question = list(ANSWERS)[1]
    return ["chat", "--prompt", question, "--greedy", "--device", "cpu", "--model", *args]


@pytest.fixture(scope="module")
def adapter_folder(fluent_folder, tmp_path_factory) -> Path:
    """An adapter as peft saves it, which answers differently from its base; its card names the folder of that."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    bloom = BloomForCausalLM.from_pretrained(fluent_folder)
    adapted = peft.get_peft_model(
        bloom, peft.LoraConfig(lora_alpha=99, target_modules=["query_key_value"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(fluent_folder)
    adapted.save_pretrained(folder)
    return folder


def test_a_pushed_model_answers_as_its_folder(hub, fluent_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in fluent_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# A model\n\n![loss](loss.png) ![far](https://a.b/c.png)\n"
    )
    (folder / "loss.png").write_bytes(b"\x89PNG\0")
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("notes.txt", ".env", "optimizer.pt", "other.png", "chart.svg"):
        (folder / name).write_text("secret")
    (folder / "checkpoints").mkdir()
    pushed = ask(hub, tmp_path / "home", "firefly", "push", "--source", folder, "--repo", "ci/fluent")
    assert hub.files("ci/fluent") == own
    assert hub.repositories["model", "ci/fluent"].private
    assert len(hub.repositories["model", "ci/fluent"].branches["main"]) == 2, "the hub's first commit, and one more"
    left = "not uploaded, since no export names them: .env, chart.svg, checkpoints, notes.txt, optimizer.pt, other.png"
    last = f"{hub.address}/ci/fluent: private, commit "
    assert pushed.stdout.splitlines()[0] == left
    assert pushed.stdout.splitlines()[-1].startswith(last)
    assert pushed.stdout.splitlines()[-1].endswith("use it: firefly chat --model ci/fluent")
    assert "model.safetensors" in pushed.stderr, "progress is shown"

    here = run("firefly", *chat(str(folder)))
    hub.fail("/objects/", "cut", 1, "GET")  # and goes on
    there = ask(hub, tmp_path / "home", "firefly", *chat("ci/fluent"))
    assert answer(there) == answer(here) == ANSWERS[list(ANSWERS)[1]]
    assert [request.status for request in hub.asked("GET", "/objects/")] == ["cut", 200]


def test_a_pushed_adapter_names_a_base_that_others_have(hub, fluent_folder, adapter_folder, tmp_path):
    home = tmp_path / "home"
    push = ["push", "--source", adapter_folder, "--repo", "ci/adapter"]
    refused = one_line(ask(hub, home, "firefly", *push, check=False))
    assert f"is an adapter of {fluent_folder}, a folder of this machine; push that and name it with --base" in refused
    refused = one_line(ask(hub, home, "firefly", *push, "--base", "ci/nowhere", check=False))
    assert refused.startswith("ci/nowhere: ")
    assert not hub.repositories
    hub.add("ci/base", fluent_folder)
    ask(hub, home, "firefly", *push, "--base", "ci/base", "--public")
    files = hub.files("ci/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    place = str(fluent_folder.parent).encode()
    assert not any(place in content for content in files.values())
    assert place in (adapter_folder / "adapter_config.json").read_bytes()
    assert not hub.repositories["model", "ci/adapter"].private
    here = answer(run("firefly", *chat(str(adapter_folder), "--max_new_tokens", "8")))
    assert here != ANSWERS[list(ANSWERS)[1]]
    there = ask(hub, home, "firefly", *chat("ci/adapter", "--max_new_tokens", "8"), token=None)
    assert answer(there) == here
    asked = json.dumps([("model", "ci/adapter", "adapter_config.json config.json")])
    assert python(hub, home, READS, asked, HF_HUB_OFFLINE="1") == ["None"], "known to have none, and to be there"


def test_the_card_of_a_pushed_adapter_names_its_base_on_the_hub(hub, fluent_folder, adapter_folder, tmp_path):
    """An export names the base of the machine by its last name alone, and not at the head, which the hub reads."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder, folder)
    begun = "It began with the weights of"
    for head in ("---\nlicense: mit\n---\n", ""):
        (folder / "README.md").write_text(f"{head}# A\n\n{begun} {fluent_folder.name}.\n", "utf-8")
        hub.repositories.clear()
        hub.add("ci/base", fluent_folder)
        push = ["push", "--source", folder, "--repo", "ci/adapter", "--base", "ci/base"]
        ask(hub, tmp_path / "home", "firefly", *push)
        card = hub.files("ci/adapter")["README.md"].decode()
        assert f"{begun} ci/base." in card
        assert ModelCard(card).data.base_model == "ci/base"
        assert ModelCard(card).data.license == ("mit" if head else None)


def shards(folder: Path, out: Path) -> Path:
    """The folder with its weights in two files and an index, as large models are saved."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            out.mkdir(exist_ok=True)
            (out / file.name).write_bytes(file.read_bytes())
    BloomForCausalLM.from_pretrained(folder).save_pretrained(out, max_shard_size="150KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    return out


def test_a_run_and_its_export_take_model_and_rows_of_the_hub(hub, fluent_folder, rows_file, tmp_path):
    home = tmp_path / "home"
    folder = shards(fluent_folder, tmp_path / "shards")
    hub.add("ci/model", {"config.json": b"{}", "model.safetensors": b"old", "notes.md": b"kept"}, private=True)
    pushed = ask(hub, home, "firefly", "push", "--source", folder, "--repo", "ci/model", "--message", "better")
    assert hub.repositories["model", "ci/model"].branches["main"][-1].message == "better"
    assert "removed, as of an earlier model, and kept in the history: model.safetensors" in pushed.stdout
    assert "replaced where they differ, and kept in the history: config.json" in pushed.stdout
    assert hub.files("ci/model").keys() == {"notes.md", *(path.name for path in folder.iterdir())}
    hub.add("ci/rows", {"train.jsonl": rows_file.read_bytes()}, "dataset", private=True)

    common = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--data.batch_size", "8"]
    data = ["--data.train_files", '["ci/rows"]', "--data.max_length", "512", "--data.micro_batch_size", "8"]
    model = ["--model.path", "ci/model", "--model.adapter", "lora", "--model.warmup_steps", "0"]
    ask(hub, home, "firefly-fit", "fit", *common, *quiet, *data, *model, "--trainer.default_root_dir", tmp_path / "run")
    assert hub.asked("GET", "/datasets/ci/rows/resolve/")
    export = ["export", "--checkpoint", tmp_path / "run", "--base", "ci/model", "--out", tmp_path / "out"]
    ask(hub, home, "firefly", *export)
    merged = BloomForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = BloomForCausalLM.from_pretrained(folder).state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(".h." in name for name in changed)


def a_gguf(file: Path) -> Path:
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(50_000))
    return file


def test_a_pushed_gguf_is_the_file(hub, tmp_path):
    file = a_gguf(tmp_path / "answers.gguf")
    (tmp_path / "notes.txt").write_text("mine")
    hub.add("ci/quantised", {"README.md": b"kept"}, private=True)
    told = ask(
        hub, tmp_path / "home", "firefly", "push", "--source", file, "--repo", "ci/quantised", "--revision", "q8"
    )
    files = hub.files("ci/quantised", revision="q8")
    assert files == {"README.md": b"kept", "answers.gguf": file.read_bytes()}
    assert hub.files("ci/quantised") == {"README.md": b"kept"}
    assert f"{hub.address}/ci/quantised/tree/q8: private" in told.stdout
    assert "use it: llama-cli -hf ci/quantised -hff answers.gguf" in told.stdout


def test_pushes_of_the_documentation_do_what_it_says(hub, fluent_folder, adapter_folder, tmp_path):
    shutil.copytree(fluent_folder, tmp_path / "chat-model")
    shutil.copytree(adapter_folder, tmp_path / "lora-adapter")
    a_gguf(tmp_path / "chat-model.gguf")
    pushes = [one for one in commands(read_blocks(DOCS / "en" / "hub.md")) if one.startswith("firefly push ")]
    assert len(pushes) == 4
    for command in pushes:
        ask(hub, tmp_path / "home", *shlex.split(command.replace("OWNER", "ci")), cwd=tmp_path)
    assert {name: one.private for (_, name), one in hub.repositories.items()} == {
        "ci/NAME": True, "ci/NAME-lora": True, "ci/NAME-gguf": False,
    }  # fmt: skip
    assert {name: len(commits) for name, commits in hub.repositories["model", "ci/NAME"].branches.items()} == {
        "main": 2,
        "second": 1,  # nothing has changed, so that there is nothing to commit
    }


PUSHES = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from firefly_lightning.errors import FireflyError
from firefly_lightning.publishing.push import push

def told(options):
    try:
        push(**options)
    except FireflyError as error:
        return str(error)
    return None

with ThreadPoolExecutor(20) as pool:
    print(json.dumps([*pool.map(told, json.loads(sys.argv[1]))]))
"""
"""Pushes at the same time, since the library waits and asks again where a hub answers 500."""


def python(hub, home, script, *args, token=WRITER, **environment):
    told = hub.environment(home, token) | environment
    result = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=ROOT, env=told)
    assert "Traceback" not in result.stderr, result.stderr
    assert WRITER not in result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_what_the_hub_refuses_is_one_line_and_nothing_is_changed(hub, fluent_folder, adapter_folder, tmp_path):
    hub.add("ci/open", {"README.md": b"mine"})
    hub.add("ci/adapter", {"adapter_config.json": b"{}"}, private=True)
    hub.add("ci/ignoring", {".gitignore": b"*.safetensors"}, private=True)
    for name in ("full", "broken", "cut", "busy", "card"):
        hub.add(f"ci/{name}", {"README.md": b"mine"}, private=True)
    hub.fail("ci/full/commit", 403, 99, message="Private repository storage limit reached, please upgrade your plan")
    hub.fail("ci/broken.git/info/lfs", 500, 99)
    hub.fail("models/ci/cut", "cut", 99)
    hub.fail("ci/card/preupload", 400, 99, message="no such licence")
    hub.fail("ci/stranger", 200, 99)
    hub.fail("ci/busy/commit", 412, 99, message="A commit has happened since")
    expected = {
        "ci/open": "is public, so that everybody would see it; allow that with --public",
        "ci/adapter": "holds adapter files, and this is of kind model; choose another repository",
        "ci/full": "answered 403 (Private repository storage limit reached, please upgrade your plan)",
        "ci/broken": "answered 500",
        "ci/cut": "was cut",
        "ci/busy": "answered 412 (A commit has happened since); somebody else has changed it meanwhile",
        "ci/ignoring": "its .gitignore leaves out model.safetensors",
        "ci/card": "answered 400 (no such licence); mend what it says",
        "ci/stranger": "does not answer as a hub does",
        "other/new": 'answered 403 (You don\'t have the rights to create a model under the namespace "other")',
        "ci": "--repo ci: is no name on the hub; write OWNER/NAME",
        "ci/-bad": "--repo ci/-bad: is no name on the hub",
        "https://huggingface.co/ci/new": "is no name on the hub",
    }
    before = {name: one.branches["main"][0] for (_, name), one in hub.repositories.items()}
    told = python(
        hub, tmp_path, PUSHES, json.dumps([{"source": str(fluent_folder), "repo": name} for name in expected])
    )
    for name, message, line in zip(expected, expected.values(), told, strict=True):
        assert line, name
        assert message in line, name
        assert name in line
        assert "\n" not in line
        assert len(line) < 400
    after = {name: one.branches["main"][-1] for (_, name), one in hub.repositories.items() if name != "ci/ignoring"}
    assert after == {name: commit for name, commit in before.items() if name != "ci/ignoring"}


@pytest.mark.parametrize(
    ("token", "environment", "message"),
    [
        (None, {}, "not logged in to the hub; run hf auth login, or set HF_TOKEN to a token that may write"),
        ("hf_wrong", {}, "answered 401 (Invalid credentials in Authorization header); it does not take your token"),
        (READER, {}, "answered 403 (You don't have the rights to create a model"),
        (WRITER, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"),
        (WRITER, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached ([Errno 111] Connection"),
        (WRITER, {"HF_ENDPOINT": "mirror"}, "HF_ENDPOINT mirror: is no address; write https:// and a host, or"),
        ("hf_令牌", {}, "HF_TOKEN holds characters that no token has; copy it from the hub again"),
    ],
    ids=["no token", "wrong token", "may not", "off line", "no hub", "no address", "no ASCII"],
)
def test_who_may_not_push_is_told_so(hub, fluent_folder, tmp_path, token, environment, message):
    options = json.dumps([{"source": str(fluent_folder), "repo": "ci/new"}])
    (told,) = python(hub, tmp_path, PUSHES, options, token=token, **environment)
    assert message in told
    assert not hub.repositories


READS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import datasets
from firefly_lightning.data.sources.records import load_hub_dataset
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.hub import find_model_file

def told(asked):
    try:
        kind, name, files = asked
        if kind == "dataset":
            return f"{len(load_hub_dataset(name))} rows"
        return str([find_model_file(name, file) for file in files.split()][-1])
    except FireflyError as error:
        return str(error)

asked = json.loads(sys.argv[1])
with ThreadPoolExecutor(20) as pool:
    print(json.dumps([*pool.map(told, asked)]))
"""


def test_what_cannot_be_read_is_one_line(hub, rows_file, tmp_path):
    rows = {"train.jsonl": rows_file.read_bytes()}
    expected = {
        "missing": "has nothing of this name, or it is private; check the name, or log in with hf auth login",
        "gated": "its owner gives it out on request; ask on",
        "forbidden": "answered 403 (not for you); your token or account may not do this",
        "slower": "answered 429 (slower); it wants fewer requests; wait some minutes",
        "broken": "answered 500 (broken); try again later",
        "cut": "was cut (",
        "stranger": "does not answer as a hub does; check HF_ENDPOINT",
        "later": "answered 500 (later); try again later",  # and not that there is no such file
    }
    of_datasets = {  # datasets itself does not say more of these
        "missing": "a dataset that could be loaded (Dataset 'ci/missing' doesn't exist on the Hub or cannot be",
        "gated": "is a gated dataset on the Hub",
    }
    for name in list(expected)[1:]:
        for kind, files in (("model", {"config.json": b"{}", "model.safetensors": bytes(5000)}), ("dataset", rows)):
            hub.add(f"ci/{name}", files, kind, gated=name == "gated")
    hub.add("ci/hidden", {"config.json": b"{}"}, private=True)
    hub.add("ci/rows", rows, "dataset")
    hub.fail("ci/forbidden", 403, 99, message="not for you")
    hub.fail("ci/slower", 429, 99, message="slower")
    hub.fail("ci/broken", 500, 99, message="broken")
    hub.fail("ci/cut/resolve", "reset", 99, "GET")
    hub.fail("/objects/", "reset", 99, "GET")
    hub.fail("ci/stranger", 200, 99)
    hub.fail("ci/later/resolve/main/model.safetensors", 500, 99, message="later")
    hub.fail("datasets/ci/later", 500, 99, message="later")
    files = "config.json model.safetensors"
    asked = [("model", f"ci/{name}", files if name == "later" else files.split()[1]) for name in expected]
    asked += [("dataset", f"ci/{name}", "") for name in expected]
    # Libraries wait and ask again where nobody answers: all at the same time.
    others = json.dumps([("model", "ci/hidden", "config.json"), ("dataset", "ci/rows", "")])
    ways = {
        "anybody": (None, {}),
        "mistaken": ("hf_wrong", {}),
        "off line": (None, {"HF_HUB_OFFLINE": "1"}),
        "no hub": (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    }
    with ThreadPoolExecutor() as pool:
        first = pool.submit(python, hub, tmp_path / "home", READS, json.dumps(asked))
        asking = {
            way: pool.submit(python, hub, tmp_path / way, READS, others, token=token, **environment)
            for way, (token, environment) in ways.items()
        }
    told = dict(zip(map(tuple, asked), first.result(), strict=True))
    for kind, name, file in asked:
        short = name.removeprefix("ci/")
        line = told[kind, name, file]
        assert line.startswith(f"{name}: "), (kind, name)
        assert (of_datasets if kind == "dataset" and short in of_datasets else expected)[short] in line, (kind, name)
        assert "; " in line
        assert "\n" not in line
        assert len(line) < 500
    told = {way: one.result() for way, one in asking.items()}
    assert "has nothing of this name, or it is private" in told["anybody"][0]
    assert told["anybody"][1] == "60 rows"
    for line in told["mistaken"]:
        assert "answered 401 (Invalid credentials in Authorization header); it does not take your token" in line
    for line in told["off line"]:
        assert "the hub is not asked, since HF_HUB_OFFLINE is set, nor is it in the cache" in line
    assert (
        "http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused); check the network" in told["no hub"][0]
    )
    assert "could be loaded (Couldn't reach 'ci/rows' on the Hub" in told["no hub"][1]


def test_a_download_that_is_cut_goes_on_where_it_was(hub, tmp_path):
    data = os.urandom(25_000_000)  # the library keeps what it has by pieces of ten million
    hub.add("ci/large", {"config.json": b"{}", "model.safetensors": data})
    hub.fail("/objects/", "cut", 1, "GET")
    (file,) = python(hub, tmp_path, READS, json.dumps([("model", "ci/large", "model.safetensors")]))
    assert Path(file).read_bytes() == data
    first, second = hub.asked("GET", "/objects/")
    assert (first.status, first.ranges) == ("cut", None)
    assert second.status == 206 or second.status == 200
    assert second.ranges == "bytes=10485760-"


def test_a_corpus_of_the_hub_prunes(hub, model_folder, rows_file, tmp_path):
    hub.add("ci/rows", {"train.jsonl": rows_file.read_bytes()}, "dataset")
    prune = ["prune", "--model", model_folder, "--corpus", "ci/rows", "--out"]
    ask(hub, tmp_path / "home", "firefly", *prune, tmp_path / "hub")
    run("firefly", *map(str, prune[:4]), str(rows_file), "--out", str(tmp_path / "file"))
    assert (tmp_path / "hub/tokenizer.json").read_bytes() == (tmp_path / "file/tokenizer.json").read_bytes()
    pushed = ask(hub, tmp_path / "home", "firefly", "push", "--source", tmp_path / "hub", "--repo", "ci/pruned")
    assert "not uploaded" not in pushed.stdout
    assert hub.files("ci/pruned") == {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
