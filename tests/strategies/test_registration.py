"""A trainer knows this project's strategies by name, whichever package is imported first, and at no cost before."""

import importlib
import subprocess
import sys
from textwrap import dedent

import lightning.pytorch.strategies
import pytest
from lightning import Trainer

from firefly_lightning.errors import FireflyError
from firefly_lightning.strategies import registration
from firefly_lightning.strategies.catalogue import CATALOGUE
from tests.support.helpers import ROOT

OWN = {strategy.name for strategy in CATALOGUE if strategy.own}

WITHOUT_ITS_INIT = f"""
    import sys, types
    package = types.ModuleType("firefly_lightning")
    package.__path__ = [{str(ROOT / "firefly_lightning")!r}]
    sys.modules["firefly_lightning"] = package
"""
"""Submodules can be imported, and nothing that ``import firefly_lightning`` itself would import."""

NAMED = """
    from lightning import Trainer
    print(type(Trainer(accelerator="cpu", devices=1, strategy="native_tp", logger=False).strategy).__name__)
"""


def in_new_process(*parts: str) -> list[str]:
    code = "".join(map(dedent, parts))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("packages", ["firefly_lightning, lightning", "lightning, firefly_lightning"])
def test_either_package_is_imported_first(packages):
    assert in_new_process(f"import {packages}", NAMED) == ["NativeTensorParallelStrategy"]


def test_names_are_registered_after_lightning_is_imported_and_cost_nothing_before():
    look = """
        import firefly_lightning.strategies.catalogue
        print(*sys.modules)
    """
    *modules, strategy = in_new_process(WITHOUT_ITS_INIT, look, NAMED)
    assert "firefly_lightning.strategies.registration" in modules
    others = {module.split(".")[0] for module in modules if "." not in module} - sys.stdlib_module_names
    assert not others & {"torch", "lightning", "transformers", "numpy", "deepspeed", "colossalai", "yaml"}
    assert {module for module in modules if module.startswith("firefly_lightning.")} == {
        f"firefly_lightning.strategies{module}" for module in ("", ".catalogue", ".registration")
    }
    assert strategy == "NativeTensorParallelStrategy"


def test_the_module_of_the_registry_is_as_python_loads_it():
    finder, module = registration._AFTER_IMPORT, lightning.pytorch.strategies
    spec = finder.find_spec(module.__name__, importlib.import_module("lightning.pytorch").__path__)
    made = importlib.util.module_from_spec(spec)
    assert spec.loader.get_source(module.__name__) == made.__loader__.get_source(module.__name__)
    spec.loader.exec_module(made)
    assert made.__loader__ is made.__spec__.loader
    assert type(made.__loader__) is type(module.__loader__)
    assert made.StrategyRegistry.keys() >= OWN
    assert made.StrategyRegistry.keys() == module.StrategyRegistry.keys()
    assert finder.find_spec("lightning.pytorch", None) is None


def test_a_finder_that_asks_all_finders_is_no_reason_to_register_twice(monkeypatch):
    class Asking:
        asked = False

        def find_spec(self, name, path, target=None):
            if self.asked:
                return None
            self.asked = True
            return next(filter(None, (finder.find_spec(name, path, target) for finder in sys.meta_path)), None)

    finder, module = registration._AFTER_IMPORT, lightning.pytorch.strategies
    others = [one for one in sys.meta_path if one is not finder]
    monkeypatch.setattr(sys, "meta_path", [finder, Asking(), *others])
    spec = finder.find_spec(module.__name__, importlib.import_module("lightning.pytorch").__path__)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.StrategyRegistry.keys() >= OWN


def test_registering_again_changes_nothing():
    finders = list(sys.meta_path)
    registration.register_when_imported()
    assert sys.meta_path == finders


def test_what_cannot_be_built_says_the_same_by_name(monkeypatch):
    with pytest.raises(ValueError, match="You selected an invalid accelerator name: `accelerator='abacus'`"):
        Trainer(strategy="zero2", accelerator="abacus")
    monkeypatch.setattr("firefly_lightning.strategies.colossalai.booster.find_spec", lambda name: None)
    monkeypatch.setattr("firefly_lightning.errors.find_spec", lambda name: None)
    for name, says in (
        ("gemini", r'gemini needs ColossalAI: pip install "firefly-lightning\[colossalai\]"'),
        ("zero2", r'deepspeed is not installed; run pip install "firefly-lightning\[deepspeed\]"'),
    ):
        with pytest.raises(FireflyError, match=says):
            Trainer(strategy=name, accelerator="cpu", devices=1)
