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
"""Lightning's name of a precision to ColossalAI's."""

NO_CLIPPING = 1e30
"""A norm that no gradient exceeds: ColossalAI computes the norm only where it may have to clip."""


class BoosterStrategy(StrategyHooks, BoosterCheckpoints, DDPStrategy):
    """Boosts the inner ``BloomForCausalLM`` in place, the one class that ColossalAI knows.

    Every step of the module runs inside the forward pass of the wrapper that ColossalAI puts around the model.

    Args:
        plugin_options: Further options of ColossalAI's plugin, by name.
        process_group_backend: Such as nccl; by the device by default.
        timeout: Of collective operations.

    Attributes:
        own_options: Options of the plugin that are not the user's to set.
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
        """The plugin, imported."""

    @abstractmethod
    def options(self, config: BloomConfig) -> dict[str, Any]:
        """Options of the plugin that follow from the strategy's arguments, the model and the run."""

    def adapt(self, bloom: BloomForCausalLM) -> None:
        """Changes what it must in the boosted model."""

    @property
    def simulated(self) -> bool:
        """Whether a CPU stands in for the device."""
        return self.root_device.type == "cpu"

    @property
    def fitting(self) -> bool:
        """Whether there is an optimizer."""
        return bool(self.trainer.state.fn == TrainerFn.FITTING)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or EnginePrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Keeps the name only: Lightning's own would cast and scale a second time."""
        name = precision_plugin and precision_plugin.precision
        if name and name not in PRECISIONS:
            raise FireflyError(
                f"{self.name}: ColossalAI cannot do precision {name}; take one of {', '.join(PRECISIONS)}"
            )
        # One that is there from the start would win over `trainer.precision`.
        self._precision_plugin = EnginePrecision(name) if name else None

    @override
    def setup_environment(self) -> None:
        """Starts the process group, imports ColossalAI and refuses what it cannot do.

        Raises:
            FireflyError: If it cannot be imported, or has no such precision or option.
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
        """Looks at ``plugin_options``.

        Raises:
            FireflyError: If one does not exist, or is the strategy's to set.
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
            FireflyError: If the module is not one around a Bloom, with one optimizer that ColossalAI knows.
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
        """Refuses an optimizer that is neither Adam nor AdamW, or with more to it.

        Raises:
            FireflyError: If so.
        """
        if type(optimizer) not in (Adam, AdamW):
            raise FireflyError(f"{self.name}: cannot do {type(optimizer).__name__}; take torch.optim.AdamW or Adam")
        for option in ("amsgrad", "maximize"):
            if any(group[option] for group in optimizer.param_groups):
                raise FireflyError(f"{self.name}: cannot do {type(optimizer).__name__} with {option}; leave it out")

    @override
    def gradient_norm(self, parameters: Iterable[Parameter]) -> Tensor:
        """As the optimizer computed it in its last step; not a number where a first step was skipped."""
        return torch.tensor(self.step_norm(self.optimizers[0]))

    @abstractmethod
    def step_norm(self, optimizer: Any) -> float:
        """The norm before clipping, without the scale of the loss."""

    @override
    def teardown(self) -> None:
        """Leaves the model where it is: its weights are in parts, and some of them without memory."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def trainer(self) -> L.Trainer:
        """The one that runs."""
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def bloom(self) -> BloomForCausalLM:
        """The model inside the module, boosted or not.

        Raises:
            FireflyError: If there is another.
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
        """A trainer that goes from training to evaluation keeps what it has; nothing else works on a model in parts."""
        if self.wrapper is None or self.fitting:
            raise FireflyError(f"{self.name}: the model was split by an earlier run; give the trainer a new module")

    def _simulate(self) -> None:
        from firefly_lightning.strategies.colossalai import simulated_device

        simulated_device.install(self.simulated_memory)

    def _move_all_but(self, bloom: BloomForCausalLM) -> None:
        """Moves the rest of the module to the device; where the model goes is the engine's business."""
        module: Any = self.lightning_module
        module.model = None
        module.to(self.root_device)
        module.model = bloom

    def _inside(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a step where the wrapper calls the model, so that its hooks see every use of a weight."""
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
"""What PyTorch says of ColossalAI's calls, on every process; no user can act on it."""

_BOOSTED: WeakSet[BloomForCausalLM] = WeakSet()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what ColossalAI and what it imports say of optional packages; later it warns as ever."""
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
