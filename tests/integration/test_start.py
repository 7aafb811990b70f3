"""A start imports what it needs, and no more; packages import only those before them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from firefly_lightning import fit, tools
from firefly_lightning.cli import FireflyCLI
from tests.support.helpers import run

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
    ["callbacks"],
    ["cli_errors"],
    ["cli"],
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


def test_help_of_firefly_fit_imports_nothing_heavy():
    code = "import sys; sys.argv = ['firefly-fit', '--help']\nfrom firefly_lightning.fit import command\ncommand()"
    assert not imported_by(code) & HEAVY


def test_help_of_firefly_fit_has_the_keys_that_the_parser_has():
    parser = FireflyCLI.subcommands()
    assert set(fit.COMMANDS) == set(parser)
    shown = {key.name for key in fit.own_keys()}
    assert len(shown) >= 25
    for prefix in ("model", "data", "checkpoint", "best_checkpoint", "throughput", "samples"):
        flag = f"--{prefix}.help" if prefix in ("model", "data") else "--help"
        listed = run("firefly-fit", "fit", flag).stdout
        for key in (key for key in shown if key.split(".")[0] == prefix and key != "data.tokenizer"):
            assert f"--{key} " in listed, key
    text = fit.overview()
    assert all(f"  {name}" in text for name in shown)
    assert all(key.text for key in fit.own_keys()), "every key is explained"


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
