"""The command ``firefly plan``: what a run takes in memory, steps and tokens, before a weight is loaded."""

import json
import re
from pathlib import Path

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import check_new_folder, new_folder

MEMORY = ("24GB", "80GB")
"""Memory of the devices for which a plan says by default what fits on them."""

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def plan(
    configs: list[str] | None = None,
    model: str | None = None,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    n_layer: int | None = None,
    n_head: int | None = None,
    strategies: list[str] | None = None,
    devices: list[int] | None = None,
    micro_batch_sizes: list[int] | None = None,
    precision: str | None = None,
    memory: list[str] | None = None,
    measure: bool = False,
    out: str | None = None,
) -> None:
    """Says what a run takes before it is started: memory by strategy, steps and tokens, and what fits on a device.

    Only the model's ``config.json`` is loaded and, where they are on this machine, the tokenizer and the rows. With
    these, the real lengths of the rows count, and the micro-batch is the one of the longest rows. Without them, every
    row is taken to have ``max_length`` tokens, all of them learned. On a GPU, CUDA's own memory (half a GB or so) comes
    on top.

    Args:
        configs: YAML files of the run, also as ``--config A.yaml --config B.yaml``, as ``firefly-fit fit`` takes them.
        model: Folder, hub name or ``config.json`` of the model; by default the model of the configuration.
        vocab_size: Tokens in the vocabulary of a model that is not here; it needs all four sizes.
        hidden_size: Width of a model that is not here.
        n_layer: Number of blocks of a model that is not here.
        n_head: Number of attention heads of a model that is not here.
        strategies: Names of the strategies to plan; all by default.
        devices: Numbers of devices to plan for; by default that of the configuration, then 1, 2, 4 and 8.
        micro_batch_sizes: Rows that a device works on at a time; by default those that divide its share of a step.
        precision: 32-true, bf16-mixed, 16-mixed or bf16-true; by default the precision of the configuration.
        memory: Memory of a device, such as 24GB (10^9 bytes) or 24GiB, to say how the model can be trained there: ways
            for one device, best first, with their commands; beside ``strategies``, ``devices`` or
            ``micro_batch_sizes``, what of these fits there, by default into 24GB and 80GB.
        measure: Also train three steps on this machine with each of ``strategies``, ``devices`` and
            ``micro_batch_sizes``, by default those of the configuration, and compare the memory.
        out: Folder to write ``plan.json`` and ``memory.png`` into, new or empty.

    Raises:
        FireflyError: If the model is not known, or a value is not possible.
    """
    from firefly_lightning.planning.comparing import compare
    from firefly_lightning.planning.figure import draw
    from firefly_lightning.planning.planned import report
    from firefly_lightning.planning.printed import at_hand, largest, place, print_largest, print_parts, print_totals
    from firefly_lightning.planning.request import describe, plan_all, read_settings, sizes_line
    from firefly_lightning.planning.runs import STRATEGIES
    from firefly_lightning.planning.ways import print_ways, ways

    given = {"vocab_size": vocab_size, "hidden_size": hidden_size, "n_layer": n_layer, "n_head": n_head}
    settings = read_settings(configs or [], model, given, precision, devices)
    inputs = [*(configs or []), model or settings.fit.model.init_args.path]
    limits = {text: _bytes(text) for text in memory or MEMORY}
    if measure and any(given.values()):
        raise FireflyError("--measure trains the model of --config: leave --vocab_size and the other sizes out")
    for name in strategies or ["auto"]:
        settings.run(name, 1, settings.share(name, 1), False, refuse=True)
    if out is not None:
        check_new_folder(Path(out).expanduser(), inputs)
    about = describe(settings)
    planned = plan_all(settings, strategies or STRATEGIES, micro_batch_sizes)
    fits = largest(planned, limits)
    found = ways(settings, limits) if memory and not (strategies or devices or micro_batch_sizes) else []
    if found:
        print_ways(found, settings.device)
    else:
        print_parts(settings, planned)
        print_totals(settings, planned)
        print_largest(fits, limits)
    measured = compare(settings, strategies, devices, micro_batch_sizes) if measure else []
    if out is not None:
        with new_folder(Path(out).expanduser(), inputs) as scratch:
            content = report(planned, fits, found, about | {"measured": measured})
            (scratch / "plan.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
            shown = at_hand(settings, planned, both=True)
            draw(scratch / "memory.png", shown, limits, f"{sizes_line(settings)}, {place(shown[0])}")
        print(f"{out}: plan.json, memory.png")


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    if not found:
        raise FireflyError(f"--memory {text}: give a number and a unit, as in 24GB or 24GiB")
    return float(found[1]) * UNITS[found[2]]
