"""ColossalAI's ``Booster`` as a Lightning strategy: what Gemini and tensor parallelism share.

Longer than 300 lines, since Lightning's hooks are methods of one class.
"""

import contextlib
import difflib
import inspect
import logging
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, ClassVar
from weakref import WeakSet

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, AdamW, Optimizer
from transformers import BloomConfig, BloomForCausalLM
from typing_extensions import override

from firefly_lightning.checkpoints.layout import MODEL_PREFIX
from firefly_lightning.errors import FireflyError, reason, some
from firefly_lightning.strategies.colossalai.checkpoints import BoosterCheckpoints
from firefly_lightning.strategies.colossalai.engine_precision import EnginePrecision
from firefly_lightning.strategies.hooks import StrategyHooks

PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
"""ColossalAI's names of precisions, by Lightning's names."""

NO_CLIPPING = 1e30
"""A limit that no gradient's norm exceeds, set because ColossalAI computes the norm only where it may have to clip."""


class BoosterStrategy(StrategyHooks, BoosterCheckpoints, DDPStrategy):
    """Has ColossalAI boost the module's ``BloomForCausalLM`` in place; it knows this class, not the module around it.

    Every step of the module runs inside the forward pass of the wrapper that ColossalAI puts around the model.

    Args:
        plugin_options: Further options of ColossalAI's plugin, by name.
        process_group_backend: Backend of the process group, such as nccl; by default the usual one of the device.
        timeout: Time after which a collective operation fails.

    Attributes:
        own_options: Names of the options of the plugin that only the strategy may set.
    """

    norm_follows_step = True
    own_options: ClassVar[frozenset[str]]

    def __init__(
        self, plugin_options: dict[str, Any] | None, process_group_backend: str | None, timeout: timedelta | None
    ) -> None:
        if find_spec("colossalai") is None:
            raise FireflyError(f'{self.name} needs ColossalAI: pip install "firefly-lightning[colossalai]"')
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.plugin_options = plugin_options or {}
        self.simulated_memory: int | None = None
        self.wrapper: Any = None
        self.booster: Any = None

    @abstractmethod
    def plugin_class(self) -> Any:
        """Imports ColossalAI's plugin and returns its class."""

    @abstractmethod
    def options(self, config: BloomConfig) -> dict[str, Any]:
        """Options for the plugin by name, from the strategy's arguments, the model and the run."""

    def adapt(self, bloom: BloomForCausalLM) -> None:
        """Changes the boosted model where the strategy needs it; by default nothing."""

    @property
    def simulated(self) -> bool:
        """Whether the device is simulated on a CPU."""
        return self.root_device.type == "cpu"

    @property
    def fitting(self) -> bool:
        """Whether the run trains, and so has an optimizer."""
        return bool(self.trainer.state.fn == TrainerFn.FITTING)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or EnginePrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Keeps only the name of the precision: Lightning's own plugin would cast and scale a second time."""
        name = precision_plugin and precision_plugin.precision
        if name and name not in PRECISIONS:
            raise FireflyError(
                f"{self.name}: ColossalAI cannot do precision {name}; take one of {', '.join(PRECISIONS)}"
            )
        # A plugin that is there from the start would win over `trainer.precision`.
        self._precision_plugin = EnginePrecision(name) if name else None

    @override
    def setup_environment(self) -> None:
        """Starts the process group, imports ColossalAI and refuses what it cannot do.

        Raises:
            FireflyError: If ColossalAI cannot be imported, or does not have the precision or an option.
        """
        super().setup_environment()
        if self.simulated and self.precision_plugin.precision == "16-mixed":
            raise FireflyError(f"{self.name}: 16-mixed needs a GPU; take bf16-mixed")
        try:
            with _quiet():
                self.plugin_class()
                if self.simulated:
                    self._simulate()
        except ImportError as error:
            raise FireflyError(
                f"{self.name}: ColossalAI cannot be imported ({reason(error)}); "
                'pip install "firefly-lightning[colossalai]"'
            ) from error
        for message in OUTDATED:
            warnings.filterwarnings("ignore", message)
        if self.simulated:
            rank_zero_info(f"{self.name}: no GPU here; ColossalAI runs on a simulated device, in the host's memory")
        self.check_options()

    def check_options(self) -> None:
        """Checks the names in ``plugin_options``.

        Raises:
            FireflyError: If an option does not exist, or only the strategy may set it.
        """
        known = inspect.signature(self.plugin_class().__base__).parameters
        for option in self.plugin_options:
            if option in self.own_options:
                raise FireflyError(f"{self.name}: plugin_options.{option} is not to be set; {self.name} does")
            if option not in known:
                near = difflib.get_close_matches(option, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise FireflyError(f"{self.name}: plugin_options.{option} is no option of ColossalAI's plugin{hint}")

    @override
    def check_model(self, config: BloomConfig) -> None:
        if self.trainer.gradient_clip_val and self.trainer.gradient_clip_algorithm == "value":
            raise FireflyError(f"{self.name}: ColossalAI clips by norm only; set trainer.gradient_clip_algorithm: norm")

    @override
    def setup(self, trainer: L.Trainer) -> None:
        """Boosts the model and, while fitting, the optimizer.

        Raises:
            FireflyError: If the module does not hold a Bloom, or its optimizer is not one that ColossalAI knows.
        """
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        bloom = self.bloom
        self._move_all_but(bloom)
        if bloom in _BOOSTED:
            self._check_boosted()
            return
        self.optimizers = []
        if self.fitting:
            self.setup_optimizers(trainer)
            self._check_optimizer()
        self._boost(bloom)
        self.adapt(bloom)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._inside("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict_step", *args, **kwargs)

    def check_adam(self, optimizer: Optimizer) -> None:
        """Refuses every optimizer but plain Adam and AdamW.

        Raises:
            FireflyError: If it is another optimizer, or has ``amsgrad`` or ``maximize``.
        """
        if type(optimizer) not in (Adam, AdamW):
            raise FireflyError(f"{self.name}: cannot do {type(optimizer).__name__}; take torch.optim.AdamW or Adam")
        for option in ("amsgrad", "maximize"):
            if any(group[option] for group in optimizer.param_groups):
                raise FireflyError(f"{self.name}: cannot do {type(optimizer).__name__} with {option}; leave it out")

    @override
    def gradient_norm(self, parameters: Iterable[Parameter]) -> Tensor:
        """The norm that the optimizer computed in its last step; NaN where its first step was skipped."""
        return torch.tensor(self.step_norm(self.optimizers[0]))

    @abstractmethod
    def step_norm(self, optimizer: Any) -> float:
        """Norm of the gradient in the optimizer's last step, before clipping and without the scale of the loss."""

    @override
    def teardown(self) -> None:
        """Tears down all but the model, which stays where it is: its weights are in parts, and some have no memory."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def trainer(self) -> L.Trainer:
        """The trainer that runs the module."""
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def bloom(self) -> BloomForCausalLM:
        """The model inside the module, boosted or not.

        Raises:
            FireflyError: If the module's ``model`` is not a Bloom.
        """
        model = getattr(self.lightning_module, "model", None)
        if not isinstance(model, BloomForCausalLM):
            raise FireflyError(f"{self.name}: the module's `model` is a {type(model).__name__}, not a BloomForCausalLM")
        return model

    def _check_optimizer(self) -> None:
        module: Any = self.lightning_module
        around = [name for name, parameter in module.named_parameters() if not name.startswith(MODEL_PREFIX)]
        if trained := [name for name in around if module.get_parameter(name).requires_grad]:
            raise FireflyError(
                f"{self.name}: ColossalAI trains the module's `model` alone, not {some(trained)}; "
                "freeze it, or take another strategy"
            )
        if len(self.optimizers) != 1:
            found = len(self.optimizers)
            raise FireflyError(f"{self.name}: the module configures {found} optimizers; ColossalAI takes one")
        if self.convert_optimizer(self.optimizers[0]) is not self.optimizers[0]:
            raise FireflyError(
                f"{self.name}: configure_optimizers returns a {type(self.optimizers[0]).__name__}; "
                "return what hooks_of(trainer.strategy).convert_optimizer makes of it"
            )

    def _boost(self, bloom: BloomForCausalLM) -> None:
        from colossalai.booster import Booster

        options = {
            **self.options(bloom.config),
            "precision": PRECISIONS[str(self.precision_plugin.precision)],
            "max_norm": float(self.trainer.gradient_clip_val or NO_CLIPPING),
            **self.plugin_options,
        }
        self.booster = Booster(plugin=self.plugin_class()(**options))
        self.wrapper, optimizer, *_ = self.booster.boost(bloom, self.optimizers[0] if self.fitting else None)
        self.optimizers = [optimizer] if optimizer else []
        _BOOSTED.add(bloom)

    def _check_boosted(self) -> None:
        """Refuses a model that was boosted already, unless the trainer that boosted it now only evaluates."""
        if self.wrapper is None or self.fitting:
            raise FireflyError(f"{self.name}: the model was split by an earlier run; give the trainer a new module")

    def _simulate(self) -> None:
        from firefly_lightning.strategies.colossalai import simulated_device

        simulated_device.install(self.simulated_memory)

    def _move_all_but(self, bloom: BloomForCausalLM) -> None:
        """Moves everything in the module but the model to the device; the engine places the model."""
        module: Any = self.lightning_module
        module.model = None
        module.to(self.root_device)
        module.model = bloom

    def _inside(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a step of the module inside the wrapper's forward pass, so that its hooks see every use of a weight."""
        bloom = self.bloom
        forward = bloom.forward

        def redirected() -> Any:
            bloom.forward = forward
            return getattr(self.lightning_module, step)(*args, **kwargs)

        bloom.forward = redirected
        try:
            return self.wrapper()
        finally:
            bloom.forward = forward

    def _evaluate(self, step: str, *args: Any, **kwargs: Any) -> Any:
        # Weights gathered in inference mode could not be trained afterwards.
        with torch.inference_mode(False), torch.no_grad():
            return self._inside(step, *args, **kwargs)


OUTDATED = ("TypedStorage is deprecated", "`torch.distributed.* is deprecated")
"""Warnings of PyTorch about ColossalAI's calls, which every process prints and no user can act on."""

_BOOSTED: WeakSet[BloomForCausalLM] = WeakSet()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what ColossalAI and its imports say of optional packages when imported; later they warn again."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
            from colossalai.logging import get_dist_logger

            get_dist_logger().set_level("WARNING")
    finally:
        logging.disable(disabled)
