"""Checkpoints in the form of ColossalAI's ``Booster``: whole weights, and the optimizer states of each process."""

import contextlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_weights
from torch import Tensor
from typing_extensions import override

from firefly_lightning.checkpoints.layout import (
    COLOSSALAI_WEIGHTS,
    DESCRIPTION_KEY,
    MODEL_PREFIX,
    colossalai_states_file,
)
from firefly_lightning.checkpoints.torch_file import load_file
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.strategies.colossalai.padded_vocabulary import strip
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints


class BoosterCheckpoints(ShardedCheckpoints):
    """Mixed into a strategy around a ``Booster``: saves and loads its checkpoints.

    Attributes:
        name: Short name of the strategy.
        booster: ColossalAI's ``Booster``.
        wrapper: The boosted model.
    """

    name: ClassVar[str]
    booster: Any
    wrapper: Any

    @abstractmethod
    def full_precision(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the weights that ColossalAI saves and loads are the float32 masters."""

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """Settings, by name, that must be the same when optimizer states are read; called once the model is boosted."""

    @override
    def optimizer_scalars(self) -> dict[str, Any]:
        from firefly_lightning.strategies.colossalai.states import STEP, steps_done

        return {STEP: torch.tensor(float(steps_done(self.boosted_optimizer)))}

    @override
    def scaler_state(self) -> dict[str, Any]:
        from firefly_lightning.strategies.colossalai.fixes import scaler_state

        return scaler_state(self.boosted_optimizer)

    @override
    def load_scaler_state(self, state: dict[str, Any]) -> None:
        from firefly_lightning.strategies.colossalai.fixes import load_scaler_state

        load_scaler_state(self.boosted_optimizer, state)

    @override
    def whole_tensors(self) -> dict[str, Tensor]:
        """Also the weights in the module but outside the model, which ColossalAI leaves alone."""
        module: Any = self.lightning_module
        around = {name: parameter for name, parameter in module.named_parameters() if not name.startswith(MODEL_PREFIX)}
        return super().whole_tensors() | around

    @property
    def boosted_optimizer(self) -> Any:
        """ColossalAI's optimizer around the module's; None while evaluating."""
        return self.optimizers[0] if self.optimizers else None

    @override
    def save_shards(self, folder: Path) -> None:
        with self.full_precision():
            self.booster.save_model(self.wrapper, str(folder / COLOSSALAI_WEIGHTS), shard=True, use_safetensors=True)
        if self.optimizers:
            # ColossalAI itself would gather the states of one weight after another on the first process.
            torch.save(self.boosted_optimizer.optim.state_dict(), folder / self._states_file)

    @override
    def load_shards(self, folder: Path, fitting: bool) -> None:
        try:
            with self.full_precision():
                # Not strict: the tied head is a name without a weight of its own.
                self.booster.load_model(self.wrapper, str(folder / COLOSSALAI_WEIGHTS), strict=False)
        except (SafetensorError, OSError, ValueError) as error:
            raise FireflyError(f"{folder}: damaged ({reason(error)}); use an earlier one") from error
        if fitting:
            self.boosted_optimizer.optim.load_state_dict(load_file(folder / self._states_file, "cpu"))

    @override
    def writer(self) -> dict[str, Any]:
        strategy: Any = self
        return {"engine": "colossalai", "strategy": self.name, "processes": strategy.world_size, **self.layout()}

    @property
    def _states_file(self) -> str:
        strategy: Any = self
        return colossalai_states_file(strategy.global_rank)


def read_weights(folder: Path, trainer: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, without rows that only pad the vocabulary.

    Args:
        folder: The checkpoint.
        trainer: Contents of the checkpoint's ``trainer.ckpt``.

    Returns:
        Weights by name, as in a ``LightningModule``.

    Raises:
        FireflyError: If a file of weights is damaged.
    """
    weights: dict[str, Tensor] = {}
    try:
        for file in sorted((folder / COLOSSALAI_WEIGHTS).glob("*.safetensors")):
            weights.update({MODEL_PREFIX + name: weight for name, weight in load_weights(file).items()})
    except SafetensorError as error:
        raise FireflyError(f"{folder}: damaged ({reason(error)}); use an earlier one") from error
    vocab_size = trainer[DESCRIPTION_KEY]["config.json"]["vocab_size"]
    return {name: strip(name, weight, vocab_size) for name, weight in weights.items()}
