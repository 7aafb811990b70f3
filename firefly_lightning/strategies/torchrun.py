"""Runs that torchrun starts: as many nodes and devices as it has, which may be others after every restart."""

import os
from typing import Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


def take_places(trainer: Any) -> None:
    """Gives a trainer's configuration the nodes and devices that torchrun has started, where it names none.

    An elastic run is started with a range of nodes, and restarted with as many as there are. Lightning would take one
    node and, on a CPU, one device, and refuse the run where torchrun has more.

    Args:
        trainer: The part of the configuration that describes the trainer; ``num_nodes`` and ``devices`` are set.
    """
    if not TorchElasticEnvironment.detect():
        return
    if trainer.num_nodes == 1:
        trainer.num_nodes = int(os.environ["GROUP_WORLD_SIZE"])
    if trainer.devices == "auto":
        trainer.devices = int(os.environ["LOCAL_WORLD_SIZE"])
