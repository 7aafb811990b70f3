"""Makes Lightning know this project's strategies by name; their classes are imported when one is built.

Lightning has no entry point for strategies. So ``import firefly_lightning`` registers this project's strategies at once
where Lightning's own are imported already, and otherwise as soon as Lightning's are imported. It imports neither.
"""

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from firefly_lightning.strategies.catalogue import CATALOGUE, CLASS_PATHS

REGISTRY_MODULE = "lightning.pytorch.strategies"
"""The module that makes Lightning's ``StrategyRegistry``.

The package ``pytorch_lightning`` has another registry and other classes, which take no module of ``lightning``."""


def register(registry: Any) -> None:
    """Registers each strategy of this project, with a function that makes it.

    Args:
        registry: Lightning's ``StrategyRegistry``.

    Raises:
        ValueError: If the registry has one of the names already.
    """
    for strategy in CATALOGUE:
        if strategy.own:
            make = partial(_make, str(strategy.class_path))
            registry.register(strategy.name, make, strategy.description, **strategy.options)


def load_class(class_path: str) -> Any:
    """Imports a class; what engines print meanwhile goes to standard error, since standard output is for answers."""
    module, _, name = class_path.rpartition(".")
    with contextlib.redirect_stdout(sys.stderr):
        return getattr(import_module(module), name)


def load_classes() -> None:
    """Imports the class of every strategy of this project."""
    for class_path in CLASS_PATHS.values():
        load_class(class_path)


def register_when_imported() -> None:
    """Registers the strategies now, or once Lightning's own are imported; further calls change nothing."""
    if _AFTER_IMPORT in sys.meta_path:
        return
    if REGISTRY_MODULE in sys.modules:
        register(import_module(REGISTRY_MODULE).StrategyRegistry)  # waits where another thread is importing it
    sys.meta_path.insert(0, _AFTER_IMPORT)


def _make(class_path: str, **options: Any) -> Any:
    return load_class(class_path)(**options)


class _AfterImport(MetaPathFinder):
    """Import hook that registers the strategies once the module of the registry has run, also when it is reloaded.

    It leaves finding the module to the other import finders.
    """

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec from the other finders, with a loader that registers; None for any other module.

        Python asks this finder first. Another package's finder of this kind may in turn ask all finders, this one too.
        """
        if fullname != REGISTRY_MODULE or self._asking:
            return None
        self._asking = True
        try:
            others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, others), None)
        finally:
            self._asking = False
        if spec and spec.loader:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads the module by its own loader, which it leaves in the module, and registers the strategies."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Has the module's own loader create the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, then registers the strategies."""
        module.__loader__ = self._loader
        if module.__spec__:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register(module.StrategyRegistry)


_AFTER_IMPORT = _AfterImport()
