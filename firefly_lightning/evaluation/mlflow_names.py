"""Has Lightning's MLflow logger keep the names of metrics, from which it strips all but ASCII."""

import re
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import xxhash
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from firefly_lightning.model.metric_names import of_kind, parted

LONGEST = 200
"""Most bytes of a kind's name as MLflow has it: its file store makes a file of that name."""


def keep_names(loggers: Iterable[Logger]) -> None:
    """Has those of the loggers that are Lightning's for MLflow keep every character that MLflow takes.

    Lightning leaves out all letters but English ones: kinds in Chinese would all be one metric without a name.
    """
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            logger.log_metrics = partial(_log_metrics, logger)  # type: ignore[method-assign]


def mlflow_name(name: str) -> str:
    """The name of a metric as MLflow takes it; the names of different metrics stay different.

    MLflow takes letters of all languages, digits, ``_``, ``.``, ``-``, blanks, and ``/`` between parts, of which none
    may be empty or only dots. Each other character becomes its number in Unicode, as in ``QA_x3a_`` for ``QA:``.
    """
    metric, kind = parted(name)
    if kind is None:
        return "/".join(map(_part, metric.split("/")))
    return of_kind(metric, _part(kind))


@rank_zero_only
def _log_metrics(logger: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Logs metrics as Lightning's logger does, except for their names."""
    from mlflow.entities import Metric

    prefix, now = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else "", int(1000 * time.time())
    numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
    logged = [Metric(mlflow_name(prefix + name), value, now, step or 0) for name, value in numbers.items()]
    logger.experiment.log_batch(run_id=logger.run_id, metrics=logged, **logger._log_batch_kwargs)


def _part(text: str) -> str:
    other = r"[^\w. -]" if text.strip(".") else r"."
    part = re.sub(other, lambda found: f"_x{ord(found[0]):x}_", text, flags=re.DOTALL) or "_x_"
    if len(part.encode()) <= LONGEST:
        return part
    digest = xxhash.xxh3_64_hexdigest(text.encode())
    return part.encode()[: LONGEST - len(digest) - 1].decode(errors="ignore") + "-" + digest
