"""A start imports what it needs, and no more; packages import only those before them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from firefly_lightning import fit, tools
from firefly_lightning.cli import FireflyCLI, make_parser
from firefly_lightning.cli_errors import known_keys
from tests.support.helpers import one_line, run
from tests.support.ranks import BIN

PACKAGE = Path(fit.__file__).parent

HEAVY = {"torch", "lightning", "transformers", "torchmetrics", "matplotlib", "pyarrow", "datasets", "deepspeed"}
"""What takes a second or more to import."""

ORDER = [
    ["errors", "interrupts", "console", "optim", "processes", "moved"],
    ["files", "prompt"],
    ["huggingface"],
    ["checkpoints", "data"],
    ["preparation", "pruning", "model", "evaluation", "strategies"],
    ["module", "chat"],
    ["preference"],
    ["callbacks"],
    ["cli_errors"],
    ["cli"],
    ["publishing"],
    ["gguf"],
    ["planning", "export"],
    ["tools", "fit"],
]
"""Packages and modules of the root: each imports only what stands before it."""


def imported_by(code: str) -> set[str]:
    """Top-level packages that a process has imported after some code."""
    shown = f"{code}\nimport sys; print('\\n' + ' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}


def test_importing_the_package_imports_nothing_heavy():
    assert not imported_by("import firefly_lightning, firefly_lightning.tools, firefly_lightning.fit") & HEAVY


@pytest.mark.parametrize("name", [None, *tools.COMMANDS])
def test_help_of_a_command_imports_nothing_heavy(name):
    arguments = [name, "--help"] if name else ["--help"]
    code = f"from firefly_lightning.tools import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert not imported_by(code) & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["test", "-h"]])
def test_help_of_firefly_fit_imports_nothing_heavy(arguments):
    code = f"import sys; sys.argv = ['firefly-fit', *{arguments}]\nfrom firefly_lightning.fit import command\ncommand()"
    assert not imported_by(code) & HEAVY


def test_help_of_firefly_fit_has_the_keys_that_the_parser_has():
    assert set(fit.COMMANDS) == set(FireflyCLI.subcommands())
    own, of_trainer = (list(keys) for keys in (fit.own_keys(), fit.trainer_keys()))
    assert len(own) >= 25
    known = known_keys(make_parser())
    assert {key.name for key in own} <= known
    assert {key.name for key in of_trainer} >= {name for name in known if re.fullmatch(r"trainer\.\w+", name)}
    for command in (None, "fit", "predict"):
        text = fit.overview(command)
        assert all(f"  {key.name}" in text for key in own)
        assert all(f"  {key.name}" in text for key in of_trainer) == (command is not None)
    assert all(key.text for key in (*own, *of_trainer)), "every key is explained"


MISPLACED = {
    "--config run.yaml fit": "--config belongs after the command; type: firefly-fit fit --config run.yaml",
    "--config=run.yaml test --ckpt_path a": "type: firefly-fit test --config=run.yaml --ckpt_path a",
    "--data.batch_size 8": "--data.batch_size belongs after the command; type: firefly-fit fit --data.batch_size 8",
}


@pytest.mark.parametrize("typed", MISPLACED)
def test_flags_before_the_command_are_told_what_to_type(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model:\n  path: here\n")
    assert one_line(run("firefly-fit", *typed.split(), check=False, cwd=tmp_path)).endswith(MISPLACED[typed])


def test_lightnings_own_configurations_stand_before_the_command(tmp_path):
    (tmp_path / "run.yaml").write_text("fit:\n  model:\n    path: here\n")
    fit.check_order(["--config", str(tmp_path / "run.yaml"), "fit"])
    fit.check_order(["--config", str(tmp_path / "none.yaml"), "fit"])
    fit.check_order(["fit", "--config", "run.yaml"])
    fit.check_order(["trian", "--config", "run.yaml"])


@pytest.mark.parametrize("name", ["firefly-fit", "firefly"])
def test_a_reader_that_is_gone_ends_a_command_without_a_word(name):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([BIN / name, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.stderr == ""
    assert ended.returncode in (0, 141)  # argparse passes over it


def test_no_trainer_of_transformers_is_imported():
    # It imports peft and bitsandbytes where they are installed, which takes a fifth of a start.
    code = "import firefly_lightning.module, sys; print('\\n'.join(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers.trainer", "transformers.trainer_utils", "peft", "bitsandbytes"} & set(modules)


def test_packages_import_only_those_before_them():
    order = {name: place for place, name in enumerate(name for names in ORDER for name in names)}
    tree = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert set(order) == tree, "every package and every module of the root has a place"
    seen, back = 0, []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports_of(path):
            other = module.removeprefix("firefly_lightning").lstrip(".").partition(".")[0]
            if own == "__init__" or other in ("", own):
                continue
            seen += 1
            if order[other] > order[own]:
                back.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert seen > 150
    assert not back


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, also within functions; those for type checkers alone left out."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("firefly_lightning"):
            members = (
                [f"{node.module}.{name.name}" for name in node.names] if node.module == "firefly_lightning" else []
            )
            found |= set(members or [node.module])
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("firefly_lightning")}
    return {name for name in found if name != "firefly_lightning.__version__"}


def test_few_modules_lie_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 15


def test_long_files_say_why_they_are():
    long = [path for path in PACKAGE.rglob("*.py") if len(path.read_text("utf-8").splitlines()) > 300]
    reasons = {path.name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for path in long}
    assert len(long) <= 4
    assert all("Longer than 300 lines, since" in " ".join(reason.split()) for reason in reasons.values()), reasons


def test_a_module_inside_a_package_of_an_old_name_can_be_imported_first():
    """Looking up its neighbours in the package must not import the package's old contents, which import it."""
    code = "import firefly_lightning.strategies.colossalai.checkpoints"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
