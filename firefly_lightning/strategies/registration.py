"""Makes Lightning know this project's strategies by name; their classes are imported when one is built.

Lightning has no entry point for strategies. So ``import firefly_lightning`` registers them where Lightning's are
imported already, and else has them registered as soon as these are: neither is imported for it.
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
"""Where Lightning's ``StrategyRegistry`` is made. That of the package ``pytorch_lightning`` is another one, of other
classes, which take no module of ``lightning``'s."""


def register(registry: Any) -> None:
    """Registers each strategy with a function that makes it.

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
    """Imports a class; what engines print meanwhile does not go to standard output, which belongs to answers."""
    module, _, name = class_path.rpartition(".")
    with contextlib.redirect_stdout(sys.stderr):
        return getattr(import_module(module), name)


def load_classes() -> None:
    """Imports the class of every strategy of this project."""
    for class_path in CLASS_PATHS.values():
        load_class(class_path)


def register_when_imported() -> None:
    """Registers at once or later, see above; further calls change nothing."""
    if _AFTER_IMPORT in sys.meta_path:
        return
    if REGISTRY_MODULE in sys.modules:
        register(import_module(REGISTRY_MODULE).StrategyRegistry)  # waits for another thread that imports it now
    sys.meta_path.insert(0, _AFTER_IMPORT)


def _make(class_path: str, **options: Any) -> Any:
    return load_class(class_path)(**options)


class _AfterImport(MetaPathFinder):
    """Has the other finders find the module, and registers once it has run; also where it is reloaded."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Asked before all others. A finder of this kind that is not ours asks all finders, us too, in its turn."""
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
    """Loads as another loader does, which is the module's from then on."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leaves it to the other."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module and registers."""
        module.__loader__ = self._loader
        if module.__spec__:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register(module.StrategyRegistry)


_AFTER_IMPORT = _AfterImport()
