"""Kills an elastic run again and again, beside one that nobody disturbs: python -m benchmarks.survive --help.

Both are started by torchrun on three simulated nodes, with ``--ckpt_path auto`` and a save in every step. One of them
loses a process, or a node with its agent, which comes back when the others have gone on, or all processes in the midst
of a save, or of a save beside the training, at steps and moments drawn at random. In the end its ``metrics.csv`` must
have every step once, in order, with the losses of the undisturbed run, TensorBoard must show each of them once, and the
rows of every step must be those of the undisturbed run. The script prints a JSON line for each kill and one for the
whole, and draws the losses, the kills and the processes.

Needs no root, but the programs ``unshare``, ``nsenter`` and ``ip``.
"""

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.elastic_run import ElasticRun, Recorded
from benchmarks.kill_and_resume import is_saving, losses_of, shown_by_tensorboard, wait_for_a_save
from benchmarks.machine import machine
from benchmarks.nodes import Nodes, nodes

NODES, GOAL = 3, 1e-6
"""Nodes of a run, and by how much of itself a loss may differ from that of the undisturbed run."""

KILLS = {"process": "tab:blue", "node": "tab:red", "save": "tab:green", "asynchronous save": "tab:purple"}
"""What is killed: a process, a node, or all processes in a save of either kind; with the colours of their marks."""


def main() -> None:
    """Trains once undisturbed and once with many kills, and compares the losses and rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--steps", type=int, default=300, help="of the run; at least 50 and five times as many as kills"
    )
    parser.add_argument(
        "--pause", type=float, default=0.3, help="seconds more for a micro-batch, so that nodes join in time"
    )
    parser.add_argument("--model", default="demo_run/bloom-zh", help="folder; bin/demo makes the default")
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="instruction rows to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine() | {"nodes": NODES}), flush=True)
    with tempfile.TemporaryDirectory() as scratch, nodes(NODES) as where:
        whole, killed = (make_run(where, Path(scratch) / name, options) for name in ("whole", "killed"))
        start(whole)
        ended(whole)
        start(killed)
        kills = []
        for kill in kill_often(killed, plan_of_kills(options.kills, options.steps, random.Random(options.seed))):
            print(json.dumps(kill), flush=True)
            kills.append(kill)
        ended(killed)
        result = compare(whole, killed, options.steps)
        print(json.dumps(result))
        if options.out:
            draw(whole, killed, kills, options.out)
    if found := [name for name in ("steps_missing_or_doubled", "steps_of_other_rows") if result[name]]:
        sys.exit(f"not what the run left that nobody disturbed: {', '.join(found)}")
    if not result["shown_once_by_tensorboard"]:
        sys.exit("TensorBoard does not show each step once")


def make_run(where: Nodes, root: Path, options: argparse.Namespace) -> ElasticRun:
    """A run whose saves are those that a file says, which each of its starts reads anew."""
    root.mkdir()
    set_saves(root, asynchronous=False)
    return ElasticRun(where, root, [
        "firefly-fit", "fit", "--config", root / "saves.yaml", "--model", f"{Recorded.__module__}.Recorded",
        "--model.pause", options.pause, "--model.path", options.model, "--data.train_files", *options.rows,
        "--data.cache_dir", root.parent / "cache", "--data.max_length", 128, "--data.batch_size", 8,
        "--model.warmup_steps", 10, "--model.learning_rate", 1e-3, "--trainer.max_steps", options.steps,
        "--samples.prompts", "[]", "--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy",
        "--trainer.strategy.timeout", "0:01:00", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar",
        "false", "--trainer.default_root_dir", root, "--ckpt_path", "auto",
    ])  # fmt: skip


def set_saves(root: Path, asynchronous: bool) -> None:
    """Says how the run saves from its next start on: every step, beside the training or while it waits."""
    checkpoint = {"every_n_steps": 1, "asynchronous": asynchronous}
    (root / "saves.yaml").write_text(json.dumps({"checkpoint": checkpoint}))


def start(run: ElasticRun) -> None:
    """Starts the agents of all nodes, and waits for a first step."""
    for node in range(NODES):
        run.start(node)
    run.wait_for(processes=NODES, steps=1)


def ended(run: ElasticRun) -> None:
    """Waits for the end of a run; exits if it fails."""
    if set(run.ended()) != {0}:
        sys.exit(f"a run failed:\n{run.output.read_text('utf-8', 'replace')[-3000:]}")


def plan_of_kills(kills: int, steps: int, chance: random.Random) -> list[tuple[int, str]]:
    """The steps after which something is killed, each with what that is; as many of each kind as can be."""
    at = sorted(chance.sample(range(3, steps - 40, 3), kills))  # the last node, too, comes back before the end
    kinds = list(itertools.islice(itertools.cycle(KILLS), kills))
    chance.shuffle(kinds)
    return list(zip(at, kinds, strict=True))


def kill_often(run: ElasticRun, planned: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """Kills what is planned, and waits each time until the run has gone on; yields what was found then."""
    chance, last = random.Random(str(planned)), run.root / "checkpoints" / "last.ckpt"
    for number, (step, kind) in enumerate(planned, 1):
        following = planned[number][1] if number < len(planned) else kind
        while (logged := max((one for one, _ in losses_of(run.root)), default=-1)) < step:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        if kind.endswith("save"):
            wait_for_a_save(last)
            time.sleep(chance.uniform(0, 0.01))
        # Whatever is killed, all processes start again then, and save as the next kill wants it.
        set_saves(run.root, following == "asynchronous save")
        before, node, began = len(run.taken()), chance.randrange(NODES), time.monotonic()
        if kind == "node":
            run.nodes.signal(node, signal.SIGKILL)
        for killed in () if kind == "node" else range(NODES) if kind.endswith("save") else [node]:
            run.nodes.signal(killed, signal.SIGKILL, but="torchrun")
        found = {"kill": number, "what": kind, "after_step": logged, "during_a_save": is_saving(last)}
        left = NODES - (kind == "node")
        run.wait_for(processes=left, steps=1, after=before)
        found |= {"goes_on_at": min(list(run.taken().values())[-1]), "seconds": round(time.monotonic() - began, 1)}
        if kind == "node":
            before, began = len(run.taken()), time.monotonic()
            run.start(node)
            run.wait_for(processes=NODES, steps=1, after=before)
            found["seconds_to_join"] = round(time.monotonic() - began, 1)
        yield found


def compare(whole: ElasticRun, killed: ElasticRun, steps: int) -> dict[str, Any]:
    """Compares the losses and rows of the two runs, step by step."""
    found = losses_of(killed.root)
    missing = set(range(steps)) - {step for step, _ in found}
    apart = differences(whole, killed)
    return {
        "steps": steps,
        "starts": len(killed.taken()),
        "steps_made_again": sum(map(len, killed.taken().values())) - steps,
        "steps_missing_or_doubled": len(missing) + len(found) - len(dict(found)),
        "steps_of_other_rows": steps - len(whole_steps(whole) & whole_steps(killed)),
        "shown_once_by_tensorboard": shown_by_tensorboard(killed.root) == list(range(steps)),
        "largest_difference": float(f"{max(apart):.2g}"),
        "steps_within_goal": sum(one <= GOAL for one in apart),
    }


def whole_steps(run: ElasticRun) -> set[tuple[int, tuple[int, ...]]]:
    """Steps with the numbers of their rows, of the last start that took each of them."""
    last = {step: tuple(rows) for taken in run.taken().values() for step, rows in taken.items()}
    return set(last.items())


def differences(whole: ElasticRun, killed: ElasticRun) -> list[float]:
    """By what share of itself the loss of each step differs."""
    expected, found = dict(losses_of(whole.root)), dict(losses_of(killed.root))
    return [abs(float(found[step]) / float(expected[step]) - 1) for step in sorted(expected) if step in found]


def held_to_goals(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that say what the kills have changed."""
    whole = next(line for line in lines if "largest_difference" in line)
    kills = [line["what"] for line in lines if "kill" in line]
    return [
        f"{len(kills)} kills: {', '.join(f'{kills.count(what)} times {what}' for what in KILLS)}; "
        f"{whole['starts']} starts, {whole['steps_made_again']} steps made again.",
        f"Of {whole['steps']} steps, {whole['steps_missing_or_doubled']} are missing or doubled, "
        f"{whole['steps_of_other_rows']} had other rows, and TensorBoard shows "
        f"{'each once' if whole['shown_once_by_tensorboard'] else 'NOT each once'}.",
        f"Losses differ by {whole['largest_difference']:.1e} of themselves at the most; "
        f"{whole['steps_within_goal']} of {whole['steps']} by no more than {GOAL:.0e}, the goal.",
    ]


def draw(whole: ElasticRun, killed: ElasticRun, kills: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the losses of both runs with the kills, the processes of the killed one, and how far the losses differ."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    losses, processes, apart = figure.subplots(3, sharex=True, height_ratios=[3, 1, 2])
    for run, style, label in ((whole, {"lw": 3, "color": "lightgrey"}, "undisturbed"), (killed, {"lw": 1}, "killed")):
        of = {step: float(loss) for step, loss in losses_of(run.root)}
        losses.plot([*of], [*of.values()], label=label, **style)
    for what, colour in KILLS.items():
        at = [kill["after_step"] for kill in kills if kill["what"] == what]
        losses.plot(at, [of[step] for step in at], "x", ms=8, mew=2, color=colour, label=f"{len(at)} times: {what}")
    for (_, count), taken in killed.taken().items():
        processes.plot([min(taken), max(taken) + 1], [count, count], "|-", color="tab:blue")
    apart.semilogy([max(one, 1e-9) for one in differences(whole, killed)], ".", label="difference of the losses")
    apart.axhline(GOAL, color="tab:red", label="goal")
    losses.set(ylabel="loss", title="An elastic run and the same run with kills")
    processes.set(ylabel="processes", ylim=(0.5, NODES + 0.5), yticks=range(1, NODES + 1))
    apart.set(xlabel="optimizer step", ylabel="relative")
    losses.legend()
    apart.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
