"""Old names of modules: code that imports or names them still works, and is told once what to write now."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from warnings import warn

MOVED = {
    "bloom": "model.fast_bloom model.attention",
    "callbacks": "callbacks.checkpoints callbacks.prediction_writer callbacks.signals",
    "chat": "chat.command",
    "checkpoint": "checkpoints.layout checkpoints.torch_file files.atomic checkpoints.paths",
    "checkpoint_io": "checkpoints.io_plugin", "configuration": "checkpoints.layout checkpoints.saved_config",
    "data.build": "preparation.build", "data.clean": "preparation.clean preparation.cleaning.findings",
    "data.columns": "preparation.columns",
    "data.duplicates": "preparation.cleaning.duplicates preparation.cleaning.choice preparation.cleaning.pieces",
    "data.figures": "preparation.figures", "data.json_arrays": "data.sources.json_arrays",
    "data.parallel": "processes", "data.prompt": "prompt", "data.records": "data.sources.records",
    "data.resumable": "files.resumable", "data.row_checks": "preparation.cleaning.row_checks",
    "data.rows": "data.sources.row_forms data.sources.known_forms",
    "data.stats": "preparation.stats preparation.token_counts",
    "data.tables": "data.counts_table console",
    "data.template_files": "preparation.templates.reader", "data.template_views": "preparation.templates.views",
    "data.templates": "preparation.templates.fill", "data.tokenized": "data.token_cache data.tokenized_rows",
    "direct_io": "files.direct_io", "folders": "files.atomic", "generation": "evaluation.generation",
    "loss": "model.loss", "metrics": "model.target_metrics", "parsing": "cli_errors",
    "planning.configuration": "planning.run_config planning.training_rows",
    "planning.report": "planning.planned planning.tables planning.figure",
    "planning.settings": "planning.request", "portable": "checkpoints.layout checkpoints.portable",
    "portable_whole": "checkpoints.layout checkpoints.unsharded",
    "preparation.duplicates": "preparation.cleaning.duplicates preparation.cleaning.choice preparation.cleaning.pieces",
    "preparation.row_checks": "preparation.cleaning.row_checks", "predictions": "evaluation.predictions",
    "progress": "checkpoints.loop_state", "progress_bar": "callbacks.progress_bar", "pruning": "pruning.command",
    "pruning_tokenizer": "pruning.vocabulary", "pruning_verify": "pruning.verify",
    "pruning_weights": "pruning.tensor_files", "pruning_writer": "pruning.weights_writer",
    "reading": "evaluation.answer_parsing", "report": "callbacks.run_report", "run_figures": "callbacks.run_figures",
    "samples": "callbacks.sample_answers", "schedule": "optim", "scores": "evaluation.answer_scores",
    "settings": "optim", "signals": "callbacks.signals", "strategies.booster": "strategies.colossalai.booster",
    "strategies.booster_checkpoints": "strategies.colossalai.checkpoints",
    "strategies.colossalai": "strategies.colossalai.strategy",
    "strategies.colossalai_fixes": "strategies.colossalai.fixes",
    "strategies.colossalai_portable": "strategies.colossalai.states",
    "strategies.deepspeed": "strategies.deepspeed.strategy",
    "strategies.deepspeed_checkpoints": "strategies.deepspeed.checkpoints",
    "strategies.deepspeed_config": "strategies.deepspeed.config",
    "strategies.deepspeed_init": "strategies.deepspeed.init",
    "strategies.deepspeed_machine": "strategies.deepspeed.machine",
    "strategies.deepspeed_portable": "strategies.deepspeed.states",
    "strategies.dtensors": "strategies.native.dtensors",
    "strategies.engine_precision": "strategies.colossalai.engine_precision",
    "strategies.native": "strategies.native.strategy",
    "strategies.native_checkpoints": "strategies.native.checkpoints",
    "strategies.native_model": "strategies.native.model",
    "strategies.padded_vocabulary": "strategies.colossalai.padded_vocabulary",
    "strategies.shards": "strategies.sharded_checkpoints",
    "strategies.simulated_device": "strategies.colossalai.simulated_device", "throughput": "callbacks.throughput",
    "web": "chat.server chat.questions",
}  # fmt: skip
"""For the old name of a module, the modules that now have its contents."""

_PACKAGE = "firefly_lightning."


class OldNames(MetaPathFinder, Loader):
    """Makes modules for old names that are gone; a package that bears an old name calls ``names_of`` itself."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Finds a module by its old name, before other finders take an old version's leftover folder for a package."""
        name = fullname.removeprefix(_PACKAGE)
        gone = name != fullname and name in MOVED and not MOVED[name].startswith(f"{name}.")
        return ModuleSpec(fullname, self) if gone else None

    def exec_module(self, module: ModuleType) -> None:
        """Gives a module with an old name the contents that it had."""
        vars(module)["__getattr__"] = names_of(module.__name__, _warn_once)


def names_of(old: str, tell: Callable[[str], None] = lambda message: None) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module with an old name.

    Args:
        old: The old name of the module.
        tell: Called with what to write instead of the old name. Packages leave it out, since jsonargparse asks each
            package on the way to a class for the class, and writes down the shortest name.
    """

    def look_up(name: str) -> Any:
        for new in () if name.startswith("__") else MOVED[old.removeprefix(_PACKAGE)].split():
            if hasattr(module := import_module(_PACKAGE + new), name):
                tell(f"{old}.{name} has moved: write {module.__name__}.{name}")
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return look_up


@cache
def _warn_once(message: str) -> None:
    warn(message, FutureWarning, stacklevel=3)  # points to the line that asks for the name
