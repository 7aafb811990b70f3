"""What both READMEs say agrees with each other and with the code."""

import json
import os
import re
import shlex
import subprocess

import torch
import yaml
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER
from tests.conftest import write_rows
from tests.support.helpers import ROOT, run
from tests.support.readme import CHINESE, ENGLISH, NOT_HERE, commands, read_blocks, write_file


def test_both_readmes_hold_the_same_blocks_in_the_same_order():
    english, chinese = read_blocks(ENGLISH), read_blocks(CHINESE)
    assert [block for block in english if block.language != "text"] == [
        block for block in chinese if block.language != "text"
    ]
    assert len(commands(english)) >= 15
    for language, least in (("bash", 12), ("python", 3), ("yaml", 3), ("json", 5)):
        assert sum(block.language == language for block in english) >= least, language
    assert {block.language for block in english + chinese} == {"bash", "python", "yaml", "json", "text"}


def test_each_readme_links_the_other_in_its_first_lines():
    for readme, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        assert f"({other.name})" in "\n".join(readme.read_text("utf-8").splitlines()[:3])


def test_both_readmes_name_the_same_keys_and_files():
    """What is in backquotes outside of blocks: flags, keys, files and formats do not depend on the language."""
    named = []
    for readme in (ENGLISH, CHINESE):
        text = re.sub(r"^```.*?^```$", "", readme.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        named.append({" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)})
    assert named[0] ^ named[1] == set()


def test_links_of_the_english_readme_lead_somewhere():
    text = ENGLISH.read_text("utf-8")
    headings = {
        re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert links
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).is_file(), link


def test_the_architecture_table_names_every_module_in_the_order_of_imports():
    table = ENGLISH.read_text("utf-8").split("## Architecture")[1]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+\.py)`", row)]
    package = ROOT / "firefly_lightning"
    there = [str(file.relative_to(package)) for file in package.rglob("*.py") if file.name != "__init__.py"]
    assert sorted(named) == sorted(there)
    for at, name in enumerate(named):
        code = (package / name).read_text("utf-8")
        for imported, member in re.findall(r"^\s*from firefly_lightning\.([\w.]+) import (\w+)", code, re.MULTILINE):
            path = imported.replace(".", "/")
            path = f"{path}/{member}.py" if (package / path).is_dir() else f"{path}.py"
            assert path in named[:at], f"{name} imports {path}"


def test_the_table_of_kinds_is_that_of_the_templates():
    for readme in (ENGLISH, CHINESE):
        rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`[,、 ]*)+) \| (.*) \|$", readme.read_text("utf-8"), re.MULTILINE)
        shown = {kind: [re.findall(r"`(\w+)`", cell) for cell in cells] for kind, *cells in rows}
        files = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in TEMPLATE_FOLDER.glob("*.yaml")}
        assert len(files) == 23
        for kind, content in files.items():
            optional = content.get("optional", [])
            assert shown[kind] == [[name for name in content["fields"] if name not in optional], optional], kind


def test_flags_of_building_that_the_readme_names_are_understood():
    shown = re.findall(r"^\| `(--\w+) ", ENGLISH.read_text("utf-8"), re.MULTILINE)
    assert len(shown) == 5
    help_text = run("firefly", "build", "--help").stdout
    assert all(flag in help_text for flag in shown)


def test_keys_that_the_readme_names_exist():
    text = ENGLISH.read_text("utf-8")
    defaults = yaml.safe_load(run("firefly-fit", "fit", "--model.path", "x", "--print_config").stdout)
    keys = set(
        re.findall(
            r"`((?:model|data|trainer|checkpoint|best_checkpoint|throughput|samples)\.(?!py`|json`|ckpt`)\w+)`", text
        )
    )
    assert len(keys) >= 20
    for key in keys:
        group, name = key.split(".")
        fields = defaults[group].get("init_args", defaults[group])
        assert name in fields, key


ORIGINAL_KEYS = {
    "output_dir", "model_name_or_path", "deepspeed", "train_file", "num_train_epochs", "per_device_train_batch_size",
    "learning_rate", "max_seq_length", "logging_steps", "save_steps", "save_total_limit", "lr_scheduler_type",
    "warmup_steps", "gradient_accumulation_steps", "disable_tqdm", "optim", "seed", "fp16", "report_to",
    "dataloader_num_workers", "save_strategy", "weight_decay", "max_grad_norm", "remove_unused_columns",
}  # fmt: skip
"""Those of train_args/finetune.json in yangjianxin1/Firefly, at d61f0293."""


def test_keys_beside_those_of_the_original_scripts_are_taken():
    section = ENGLISH.read_text("utf-8").split("## Coming from the original scripts\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")][1:]
    theirs, ours = ([code for row in rows for code in re.findall("`([^`]+)`", row[column])] for column in (0, 1))
    assert {code.split(":")[0] for code in theirs} >= ORIGINAL_KEYS
    given = [code.split(": ") for code in ours if ": " in code]
    assert len(given) >= 20
    others = {code for row in rows for code in re.findall(r"`((?:model|data|trainer)\.\w+)`", row[1] + row[2])}
    assert len(others) >= 5
    flags = [part for key, value in given for part in (f"--{key}", value)]
    parsed = yaml.safe_load(run("firefly-fit", "fit", *flags, "--print_config").stdout)

    def held(key: str):
        group, _, name = key.partition(".")
        fields = parsed[group]
        return (fields.get("init_args", fields) if name else parsed)[name or group]

    def plain(value) -> float | str:
        try:
            return float(str(value))
        except ValueError:
            return str(value).lower()

    assert [plain(held(key)) for key, _ in given] == [plain(value) for _, value in given]
    for key in others:
        held(key)


def test_commands_for_several_machines_are_understood(tmp_path):
    blocks = read_blocks(ENGLISH)
    write_file(tmp_path, next(block for block in blocks if block.path == "train.yaml"))
    shown = [line for block in blocks if block.language == "text" for line in block.code.splitlines()]
    shown = [line.split(" firefly-fit ")[1] for line in shown if " firefly-fit " in line]
    assert len(shown) == 3
    for arguments in shown:
        parsed = run("firefly-fit", *shlex.split(arguments), "--print_config", cwd=tmp_path).stdout
        trainer = yaml.safe_load(parsed)["trainer"]
        assert (trainer["num_nodes"], trainer["devices"], trainer["strategy"]) == (2, "8", "zero3")


def test_the_memory_of_strategies_is_that_of_the_formulas():
    """Bytes a parameter on a device and on the host, from the papers that the README names."""
    on_device = {
        "auto": "16", "ddp": "16", "zero1": "4+12/N", "zero2": "2+14/N", "zero3": "16/N", "fsdp2": "16/N",
        "tensor_parallel": "16/N", "native_tp": "16/N", "gemini": "14/N", "zero2_offload": "2",
    }  # fmt: skip
    on_host = {"zero2_offload": 14, "zero3_offload": 16, "gemini_offload": 14}
    models = {"1b4": (46_145, 2048, 24, 16), "2b6": (46_145, 2560, 30, 32)}
    text = ENGLISH.read_text("utf-8")
    table = re.search(r"^\| strategy \| 1b4, 1 device .*?\n\n", text, re.MULTILINE | re.DOTALL)[0].splitlines()[2:]
    shown = {name: row.split("|")[2:-1] for row in table for name in re.findall(r"`(\w+)`", row)}
    assert shown.keys() == on_device.keys() | on_host.keys()
    places = [(size, devices) for size in models for devices in (1, 8)]
    for name, cells in shown.items():
        for cell, (size, devices) in zip(cells, places, strict=True):
            count = unique_parameters(*models[size])
            assert f"{count:,} " in text
            numbers = [float(number) for number in re.findall(r"\d+\.\d", cell)]
            device = [eval(on_device[name], {"N": devices})] if name in on_device else []
            host = [on_host[name]] if name in on_host else []
            assert numbers == [round(share * count / 1e9, 1) for share in device + host], (name, cell)


def unique_parameters(vocab_size: int, hidden: int, layers: int, heads: int) -> int:
    config = BloomConfig(vocab_size=vocab_size, hidden_size=hidden, n_layer=layers, n_head=heads)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BloomForCausalLM(config).parameters())


def test_rows_that_the_readme_shows_are_read(tmp_path):
    shown = [json.loads(block.code) for block in read_blocks(ENGLISH) if block.language == "json"]
    raw, *rows = shown
    assert raw.keys() == {"text", "label"}
    read = [next(read_rows(str(write_rows(tmp_path / f"{at}.jsonl", [row])))) for at, row in enumerate(rows)]
    assert [len(row.turns) for row in read] == [1, 1, 2, 2]
    assert read[2].turns == read[3].turns


def test_scripts_that_are_not_run_here_run_in_continuous_integration():
    written = [command for command in commands(read_blocks(ENGLISH)) if command.startswith(NOT_HERE)]
    no_deps = "constraints/current-colossalai.txt"
    assert written == ["bin/demo", "bin/test", "pip install -e .", f"pip install --no-deps -r {no_deps}"]
    assert no_deps in (ROOT / "bin" / "test").read_text("utf-8")
    ran = [line for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines() if not line.startswith("#")]
    for script in ("bin/demo", "bin/test", ".ci/run", "bin/make-env"):
        assert os.access(ROOT / script, os.X_OK), script
        assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0, script
    assert {"bin/demo", "bin/test"} <= set(" ".join(ran).split())
    assert "-m pip " in (ROOT / "bin" / "make-env").read_text("utf-8")
