"""Runs that were planned, with what each takes, and all of them as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from firefly_lightning.planning.memory import Estimate
from firefly_lightning.planning.runs import Run


@dataclass(frozen=True)
class Planned:
    """A run and what it takes.

    Attributes:
        run: How the model is trained.
        rows: Rows of a micro-batch.
        takes: Memory that the run takes.
    """

    run: Run
    rows: int
    takes: Estimate

    def fields(self) -> dict[str, Any]:
        """The run as JSON has it; memory in bytes."""
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


def report(planned: Sequence[Planned], fits: Sequence[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """The content of ``plan.json``; memory in bytes."""
    model = planned[0].run.model
    return {
        "model": asdict(model) | {"parameters": model.parameters},
        **about,
        "largest_micro_batch": list(fits),
        "runs": [one.fields() for one in planned],
    }
