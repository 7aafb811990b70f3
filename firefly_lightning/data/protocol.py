"""What a data module of this project offers beyond Lightning's, and how other code asks whether it has one."""

from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerFast

from firefly_lightning.data.batches import PlannedBatches
from firefly_lightning.prompt import PromptFormat


@runtime_checkable
class PlannedData(Protocol):
    """A data module whose optimizer steps are planned, and whose rows have kinds and places.

    :class:`FireflyDataModule` is one. A run can use any other data, also loaders without a data module, but then lacks
    all that only planned data can tell.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the token ids."""

    @property
    def prompt(self) -> PromptFormat:
        """The format that the rows have been put into."""

    @property
    def train(self) -> PlannedBatches | None:
        """Micro-batches to train on, with their plan, sources, kinds and counts; None until they are set up."""

    @property
    def val(self) -> PlannedBatches | None:
        """Micro-batches to validate on; None where there are none."""

    @property
    def test(self) -> PlannedBatches | None:
        """Micro-batches to test on; None where there are none."""

    def describe_step(self, step: int) -> list[str]:
        """Source, line and kind of every row of an optimizer step of training."""


def data_of(trainer: Any) -> PlannedData | None:
    """The trainer's data module where it is :class:`PlannedData`; None for other data, and without a trainer."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, PlannedData) else None


def batches_of(loader: Any) -> PlannedBatches | None:
    """The micro-batches of a loader where they are :class:`PlannedBatches`, whoever made the loader; else None."""
    batches = getattr(loader, "dataset", None)
    return batches if isinstance(batches, PlannedBatches) else None
