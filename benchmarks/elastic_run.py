"""An elastic run on simulated nodes: torchrun's agents, and a module that says which rows each process takes."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.nodes import HEAD, PORT, Nodes
from firefly_lightning import FireflyModule

BIN, ROOT = Path(sys.executable).parent, Path(__file__).parents[1]

PATIENCE = 1800
"""Seconds after which a run counts as hanging."""

SOON = "is_host=false,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
"""Settings of the rendezvous with which a lost node is noticed within seconds."""


class Recorded(FireflyModule):
    """A module that writes down the rows of every micro-batch, and takes its time, so that there is time to kill it.

    Args:
        pause: Seconds that a micro-batch takes longer.
    """

    def __init__(self, pause: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pause = pause

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Takes a micro-batch as any module of firefly does."""
        taken = {"step": batch["step"], "rows": batch["rows"].tolist()}
        start = f"{os.environ.get('MASTER_PORT', 0)}-{self.trainer.world_size}"
        with (Path(self.trainer.default_root_dir) / f"taken-{start}-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(taken) + "\n")
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)


class ElasticRun:
    """A run whose processes torchrun starts anew, on as many nodes as there are, whenever one is lost or comes.

    Args:
        where: The nodes.
        root: Folder of the run, which all nodes share.
        arguments: The command ``firefly-fit fit`` with all its arguments.
    """

    def __init__(self, where: Nodes, root: Path, arguments: Sequence[object]) -> None:
        self.nodes, self.root, self.output = where, root, root / "output"
        self.arguments = arguments
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        root.mkdir(parents=True, exist_ok=True)

    def start(self, node: int) -> None:
        """Starts the agent of a node."""
        name, *arguments = map(str, self.arguments)
        self.agents[node] = self.nodes.start(
            node, BIN / "torchrun", "--no-python", "--nnodes", "1:3", "--nproc-per-node", 1, "--max-restarts", 100,
            "--monitor-interval", 0.2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HEAD}:{PORT}", "--rdzv-id",
            self.root.name, "--rdzv-conf", SOON, "--local-addr", f"10.78.0.{node + 1}", BIN / name, *arguments,
            output=self.output, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip

    def taken(self) -> dict[tuple[str, int], dict[int, list[int]]]:
        """For each start of the processes and their number: by step, the rows that they took, sorted."""
        found: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for file in sorted(self.root.glob("taken-*.jsonl"), key=lambda path: path.stat().st_mtime):
            _, start, processes, _ = file.stem.split("-")
            for line in file.read_text().splitlines():
                taken = json.loads(line)
                found[start, int(processes)][taken["step"]] += taken["rows"]
        return {start: {step: sorted(rows) for step, rows in steps.items()} for start, steps in found.items()}

    def wait_for(self, processes: int, steps: int, after: int = 0) -> None:
        """Waits until some processes, started after so many starts, have taken so many steps."""
        end = time.monotonic() + PATIENCE
        while not any(
            (count, len(taken) >= steps) == (processes, True)
            for (_, count), taken in list(self.taken().items())[after:]
        ):
            assert time.monotonic() < end, self.output.read_text("utf-8", "replace")[-5000:]
            assert any(agent.poll() is None for agent in self.agents.values()), "the run is at its end"
            lost = [agent.poll() for agent in self.agents.values() if agent.poll()]
            assert set(lost) <= {-9}, self.output.read_text("utf-8", "replace")[-10000:]
            time.sleep(0.1)

    def ended(self) -> list[int]:
        """Exit codes of the agents that still run, when they have ended."""
        return [agent.wait(PATIENCE) for agent in self.agents.values() if agent.poll() is None]
