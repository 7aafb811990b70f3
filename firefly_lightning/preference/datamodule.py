"""PreferenceDataModule: from names of files to planned micro-batches of pairs."""

from typing import Any

from firefly_lightning.data.datamodule import FireflyDataModule
from firefly_lightning.data.sources.pair_forms import row_to_answer, rows_of_pair
from firefly_lightning.data.sources.row_forms import RowRules
from firefly_lightning.errors import FireflyError
from firefly_lightning.module import FireflyModule
from firefly_lightning.preference.module import PreferenceModule
from firefly_lightning.preference.pairs import PlannedPairs, TokenizedPairs


class PreferenceDataModule(FireflyDataModule):
    """Pairs of a chosen and a rejected answer as micro-batches whose steps do not depend on the number of devices.

    ``batch_size``, ``micro_batch_size``, weights, caps and fractions count pairs. Each answer, with the prompt before
    it, is a row of at most ``max_length`` tokens; a pair is left out where nothing is left of one of its answers.

    Args:
        args: Arguments of :class:`FireflyDataModule`.
        kwargs: Arguments of :class:`FireflyDataModule`, but ``row_format`` and ``learn``.
    """

    token_rows = TokenizedPairs
    batches = PlannedPairs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # jsonargparse leaves out of the keys what is given here.
        super().__init__(*args, row_format=None, learn="last", **kwargs)  # type: ignore[misc]

    def rules(self, answering: bool) -> RowRules:
        """Both rows of a pair are read to be learned; a prompt that is to be answered is one row, whatever its form."""
        if answering:
            return RowRules(answering=True, read=row_to_answer)
        return RowRules(read=rows_of_pair, together=2)

    def setup(self, stage: str) -> None:
        """Plans the steps.

        Raises:
            FireflyError: If the run's module would learn both answers of a pair like targets.
        """
        module = getattr(self.trainer, "lightning_module", None)
        if isinstance(module, FireflyModule) and not isinstance(module, PreferenceModule) and stage != "predict":
            raise FireflyError(
                f"data: {type(module).__name__} would learn rejected answers too; set model.class_path to "
                "firefly_lightning.PreferenceModule, or data.class_path to firefly_lightning.FireflyDataModule"
            )
        super().setup(stage)
