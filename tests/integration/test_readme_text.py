"""What the READMEs and the documentation say in two languages agrees with each other and with the code."""

import ast
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.data.sources.pair_forms import read_pair
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER
from tests.conftest import write_rows
from tests.integration.test_start import ORDER
from tests.support.helpers import ROOT, run
from tests.support.readme import NOT_HERE, READMES, commands, documents, page, read_blocks, write_file

LANGUAGES = ("en", "zh")
PACKAGE = ROOT / "firefly_lightning"


def blocks_of(language: str) -> list:
    return [block for document in documents(language) for block in read_blocks(document)]


def test_both_languages_hold_the_same_blocks_page_by_page():
    """So that it is enough to run those of one; figures and output may differ."""
    assert [path.name for path in documents("en")[1:]] == [path.name for path in documents("zh")[1:]]
    for english, chinese in zip(documents("en"), documents("zh"), strict=True):
        pair = [[block for block in read_blocks(path) if block.language != "text"] for path in (english, chinese)]
        assert pair[0] == pair[1], english
    found = [block.language for block in blocks_of("en") + blocks_of("zh")]
    assert {language: found.count(language) for language in set(found)} == {
        "bash": 2 * 66, "python": 2 * 9, "yaml": 2 * 6, "json": 2 * 17, "text": 2 * 9,
    }  # fmt: skip


def test_a_readme_is_read_in_minutes_and_links_the_other():
    for language, other in (("en", "zh"), ("zh", "en")):
        lines = READMES[language].read_text("utf-8").splitlines()
        assert len(lines) <= 250
        assert f"({READMES[other].name})" in "\n".join(lines[:3])


@pytest.mark.parametrize(("language", "says"), [("en", "**Bloom only.**"), ("zh", "**只支持 Bloom。**")])
def test_what_cannot_be_trained_is_said_before_anything_is_shown(language, says):
    before, _ = READMES[language].read_text("utf-8").split("```", 1)
    assert says in before


@pytest.mark.parametrize("language", LANGUAGES)
def test_who_does_not_reach_the_hub_is_told_of_others(language):
    assert "ModelScope" in READMES[language].read_text("utf-8")
    shown = page("troubleshooting", language)
    for other in ("export HF_ENDPOINT=", "pip install modelscope", "snapshot_download("):
        assert other in shown


def test_both_languages_name_the_same_keys_and_files():
    """What is in backquotes outside of blocks: flags, keys, files and formats do not depend on the language."""
    for pair in zip(documents("en"), documents("zh"), strict=True):
        named = []
        for document in pair:
            text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
            named.append({" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)})
        assert named[0] ^ named[1] == set(), pair[0]


def anchors(document: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("language", LANGUAGES)
def test_links_lead_somewhere(language):
    count = 0
    for document in documents(language):
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text("utf-8")):
            if not link.startswith("https://"):
                name, _, anchor = link.partition("#")
                target = document.parent / name if name else document
                assert target.is_file(), f"{document}: {link}"
                assert not anchor or anchor in anchors(target), f"{document}: {link}"
                count += 1
    assert count >= 60


def test_the_order_of_packages_is_that_of_imports():
    cell = re.compile(r"^\| (`[\w/]+`(?:[,、] ?`[\w/]+`)*) \|", re.MULTILINE)
    for language in LANGUAGES:
        rows = [re.findall(r"`(\w+)/?`", names) for names in cell.findall(page("architecture", language))]
        place = {name: at for at, names in enumerate(rows) for name in names}
        shown = [name for names in ORDER for name in names if name not in ("moved",)]
        assert set(shown) == set(place)
        for before, names in enumerate(ORDER):
            for after in ORDER[before + 1 :]:
                assert all(place[name] <= place[later] for name in names for later in after if name in place), language


@pytest.mark.parametrize("language", LANGUAGES)
def test_paths_in_the_architecture_exist(language):
    named = set(
        re.findall(r"`((?:firefly_lightning|docs|configs)/[\w/.]*|[\w-]+\.yml)`", page("architecture", language))
    )
    assert len(named) >= 20
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_messages_with_a_cure_are_those_of_the_code(language):
    """Each piece of a message, between names and numbers, is in a text of the package."""
    texts = [
        node.value
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    messages = re.findall(r"^\| `([^`]+)` \|", page("troubleshooting", language), re.MULTILINE)
    assert len(messages) >= 40
    for message in messages:
        for piece in filter(None, (part.strip(" :;,()") for part in message.split("…"))):
            assert any(piece in text for text in texts), f"{message}: {piece}"


def test_the_table_of_kinds_is_that_of_the_templates():
    for language in LANGUAGES:
        rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`[,、 ]*)+) \| (.*) \|$", page("building", language), re.MULTILINE)
        shown = {kind: [re.findall(r"`(\w+)`", cell) for cell in cells] for kind, *cells in rows}
        files = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in TEMPLATE_FOLDER.glob("*.yaml")}
        assert len(files) == 23
        for kind, content in files.items():
            optional = content.get("optional", [])
            assert shown[kind] == [[name for name in content["fields"] if name not in optional], optional], kind


def test_flags_of_building_that_are_documented_are_understood():
    shown = re.findall(r"^\| `(--\w+) ", page("building"), re.MULTILINE)
    assert len(shown) == 6
    help_text = run("firefly", "build", "--help").stdout
    assert all(flag in help_text for flag in shown)


def test_keys_that_are_documented_exist():
    told = [document for document in documents("en") if document.stem != "surprises"]  # of Lightning's own attributes
    text = "\n".join(document.read_text("utf-8") for document in told)
    defaults, of_pairs = (
        yaml.safe_load(run("firefly-fit", "fit", *config, "--model.path", "x", "--print_config").stdout)
        for config in ([], ["--config", "configs/dpo.yaml"])
    )
    keys = set(
        re.findall(
            r"`((?:model|data|trainer|checkpoint|best_checkpoint|throughput|samples)\.(?!py`|json`|ckpt`)\w+)`", text
        )
    )
    assert len(keys) >= 20
    for key in keys:
        group, name = key.split(".")
        fields = defaults[group].get("init_args", defaults[group])
        assert name in fields or name in of_pairs[group]["init_args"], key


ORIGINAL_KEYS = {
    "output_dir", "model_name_or_path", "deepspeed", "train_file", "num_train_epochs", "per_device_train_batch_size",
    "learning_rate", "max_seq_length", "logging_steps", "save_steps", "save_total_limit", "lr_scheduler_type",
    "warmup_steps", "gradient_accumulation_steps", "disable_tqdm", "optim", "seed", "fp16", "report_to",
    "dataloader_num_workers", "save_strategy", "weight_decay", "max_grad_norm", "remove_unused_columns",
}  # fmt: skip
"""Those of train_args/finetune.json in yangjianxin1/Firefly, at d61f0293."""


def test_keys_beside_those_of_the_original_scripts_are_taken():
    rows = [line.split("|")[1:4] for line in page("original-scripts").splitlines() if line.startswith("| `")][1:]
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
    blocks = blocks_of("en")
    write_file(tmp_path, next(block for block in blocks if block.path == "train.yaml"))
    shown = [line for block in blocks if block.language == "text" for line in block.code.splitlines()]
    shown = [line.split(" firefly-fit ")[1] for line in shown if " firefly-fit " in line]
    assert len(shown) == 4
    for arguments in shown:
        parsed = run("firefly-fit", *shlex.split(arguments), "--print_config", cwd=tmp_path).stdout
        trainer = yaml.safe_load(parsed)["trainer"]
        assert (trainer["num_nodes"], trainer["devices"], trainer["strategy"]) == (2, "8", "zero3")


def test_the_memory_of_strategies_is_that_of_the_formulas():
    """Bytes a parameter on a device and on the host, from the papers that the page names."""
    on_device = {
        "auto": "16", "ddp": "16", "zero1": "4+12/N", "zero2": "2+14/N", "zero3": "16/N", "fsdp2": "16/N",
        "tensor_parallel": "16/N", "native_tp": "16/N", "gemini": "14/N", "zero2_offload": "2",
    }  # fmt: skip
    on_host = {"zero2_offload": 14, "zero3_offload": 16, "gemini_offload": 14}
    models = {"1b4": (46_145, 2048, 24, 16), "2b6": (46_145, 2560, 30, 32)}
    text = page("strategies")
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


def test_rows_that_are_documented_are_read(tmp_path):
    shown = [json.loads(block.code) for block in blocks_of("en") if block.language == "json"]
    pairs = [row for row in shown if "chosen" in row]
    readme, raw, *rows = [row for row in shown if row not in pairs]
    assert readme == raw
    assert [read_pair(row).chosen for row in pairs] == ["是好评。", "Goodbye.", "2", "2", "Goodbye."]
    assert raw.keys() == {"text", "label"}
    read = [next(read_rows(str(write_rows(tmp_path / f"{at}.jsonl", [row])))) for at, row in enumerate(rows)]
    assert [len(row.turns) for row in read] == [1, 1, 2, 2, 2, 2, 2, 1, 2, 1]
    assert read[2].turns == read[3].turns == read[4].turns == read[5].turns == read[6].turns
    assert read[7].turns[0][0] == "你是翻译。\n再见怎么说？"
    assert read[8].learned == (False, True)
    assert [row.document for row in read] == [False] * 9 + [True]


def test_commands_that_are_not_run_here_run_in_continuous_integration():
    written = [command for command in commands(blocks_of("en")) if command.startswith(NOT_HERE)]
    no_deps = "constraints/current-colossalai.txt"
    install = "pip install -e ."
    hub = ["export HF_ENDPOINT=https://hf-mirror.com"]
    hub += [one for one in written if one.startswith("hf download ")]
    pushes = [one for one in written if one.startswith("firefly push ")]
    assert len(pushes) == 4, "tests of the hub run them"
    vllm = [one for one in written if "vllm" in one or one.startswith("pip uninstall ")]
    assert len(vllm) == 3, "run by hand, as the page says"
    assert written == [
        "bin/demo", "bin/test", install, 'pip install -e ".[docs]"', "mkdocs build",
        install, f"pip install --no-deps -r {no_deps}", 'pip install -e ".[adapters]"',
        "bin/demo-preference", "bin/demo-pretrain", "bin/demo-preference",
        'pip install -e ".[serving]"', *vllm, 'pip install -e ".[gguf]"', "npm install node-llama-cpp",
        "hf auth login", *pushes, *hub, "pip install modelscope",
        next(one for one in written if "modelscope import snapshot_download" in one),
    ]  # fmt: skip
    assert len(hub) == 3
    made = (ROOT / "bin" / "test").read_text("utf-8")
    assert no_deps in made
    assert "mkdocs build --strict" in made
    ran = [line for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines() if not line.startswith("#")]
    for script in ("bin/demo", "bin/demo-pretrain", "bin/demo-preference", "bin/test", ".ci/run", "bin/make-env"):
        assert os.access(ROOT / script, os.X_OK), script
        assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0, script
    assert {"bin/demo", "bin/test"} <= set(" ".join(ran).split())
    assert "-m pip " in (ROOT / "bin" / "make-env").read_text("utf-8")
    assert '"-m", "pip"' in (ROOT / "bin" / "install_packages.py").read_text("utf-8")
