"""Planned runs, each with the memory it takes, and how they are written as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from firefly_lightning.planning.memory import Estimate
from firefly_lightning.planning.runs import Run


@dataclass(frozen=True)
class Planned:
    """A planned run and the memory it takes.

    Attributes:
        run: The run: model, strategy, devices and precision.
        rows: Rows of a micro-batch.
        takes: Memory that the run takes.
    """

    run: Run
    rows: int
    takes: Estimate

    def fields(self) -> dict[str, Any]:
        """The run as ``plan.json`` has it, with memory in bytes."""
        return {
            "strategy": self.run.strategy,
            "devices": self.run.devices,
            "micro_batch_size": self.rows,
            "micro_batches": self.run.micro_batches,
            "gradient_checkpointing": self.run.checkpointing,
            "tokens": self.run.load.tokens,
            "peak": round(self.takes.peak),
            "peak_at": self.takes.peak_at,
            "device": {part: round(size) for part, size in self.takes.parts.items()},
            "host": {part: round(size) for part, size in self.takes.host.items()},
            "moments": {
                name: {part: round(size) for part, size in parts.items()} for name, parts in self.takes.moments.items()
            },
        }


def report(
    planned: Sequence[Planned],
    fits: Sequence[dict[str, Any]],
    ways: Sequence[dict[str, Any]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``plan.json``, with memory in bytes.

    Args:
        planned: All planned runs.
        fits: The largest micro-batch that fits on each device, as ``largest`` gives it.
        ways: Ways to train on one device, as :func:`firefly_lightning.planning.ways.ways` gives them.
        about: What is known of model, data and measured runs.
    """
    model = planned[0].run.model
    return {
        "model": asdict(model) | {"parameters": model.parameters},
        **about,
        "largest_micro_batch": list(fits),
        "ways": list(ways),
        "runs": [one.fields() for one in planned],
    }
