"""Compares cleaning with what a user would run instead: python -m benchmarks.clean --help.

The script makes many rows out of real ones: the first half of one text joined to the second half of another, and among
them copies, and copies of which a few characters are missing. Where many more rows are made than there are, halves are
repeated so often that most rows are near copies; ``--part 12`` joins parts of so many characters instead. Each system
works in a process of its own and prints a JSON line; the last line compares what they found.

    firefly        firefly clean, on all cores
    one_process    the same with --workers 1
    before         another checkout of this project, given by --before
    datatrove      the four stages of datatrove's MinHash on as many cores, with as many bands of as many hashes of the
                   same pieces of five characters; it looks for repeated rows only, and joins to groups what has a band
                   in common without comparing it
"""

import argparse
import glob
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import machine, peak_gb
from benchmarks.processes import alone

SHARDS = 8
"""Files that the rows are in."""


def main() -> None:
    """Makes the rows, then measures one system after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["firefly", "one_process", "datatrove"], choices=sorted(RUNS))
    parser.add_argument("--rows", nargs="+", default=["demo_run/rows/*.jsonl"], help="real rows in Firefly's form")
    parser.add_argument("--count", type=int, default=200_000, help="rows to make")
    parser.add_argument("--part", type=int, help="characters of each part that texts are made of, in place of halves")
    parser.add_argument("--before", type=Path, help="folder of a checkout, for the system of that name")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="disk to work on, where the system's temporary folder is too small")
    parser.add_argument("--out", help="PNG to draw")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        place = Path(scratch)
        write_rows(place, options)
        lines = []
        for system in options.systems:
            lines.append({"system": system, **alone(RUNS[system], options, place)})
            print(json.dumps(lines[-1]), flush=True)
        print(json.dumps(compared(place, options)))
    if options.out:
        draw(lines, Path(options.out))


def write_rows(place: Path, options: argparse.Namespace) -> None:
    """Writes the rows, each with its number as a field of its own, in several files."""
    sources = sorted(name for pattern in options.rows for name in glob.glob(pattern))  # noqa: PTH207 - may be absolute
    real = [json.loads(line) for source in sources for line in Path(source).read_text("utf-8").splitlines()]
    (place / "rows").mkdir()
    made = made_rows(real, options.count, options.part, random.Random(0))
    for shard in range(SHARDS):
        with (place / "rows" / f"{shard}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(options.count * shard // SHARDS, options.count * (shard + 1) // SHARDS):
                file.write(json.dumps(next(made), ensure_ascii=False) + "\n")


def made_rows(
    real: Sequence[dict[str, str]], count: int, part: int | None, chance: random.Random
) -> Iterator[dict[str, str]]:
    """Yields rows made of real ones; of a hundred, ten are copies with a gap and five are plain copies."""
    earlier: list[dict[str, str]] = []
    for _ in range(count):
        how = chance.random()
        if earlier and how < 0.15:
            row = earlier[chance.randrange(len(earlier))]
            if how < 0.1:
                at = chance.randrange(max(len(row["input"]) - 3, 1))
                row = {**row, "input": row["input"][:at] + row["input"][at + 3 :]}
        elif part:
            one = chance.choice(real)
            row = {"kind": one["kind"]}
            row |= {key: of_parts(real, key, len(one[key]), part, chance) for key in ("input", "target")}
        else:
            one, two = chance.choice(real), chance.choice(real)
            halves = one["input"][: len(one["input"]) // 2] + two["input"][len(two["input"]) // 2 :]
            row = {"kind": one["kind"], "input": halves, "target": one["target"]}
        if how >= 0.15 and len(earlier) < 100_000:
            earlier.append(row)
        yield row


def of_parts(real: Sequence[dict[str, str]], key: str, length: int, part: int, chance: random.Random) -> str:
    """A text of about ``length`` characters, made of parts of ``part`` characters of other rows."""
    text = ""
    while len(text) < length:
        other = chance.choice(real)[key]
        at = chance.randrange(max(len(other) - part + 1, 1))
        text += other[at : at + part]
    return text


def firefly(options: argparse.Namespace, place: Path, workers: int | None = None) -> dict[str, Any]:
    """Measures ``firefly clean``."""
    from firefly_lightning.preparation.clean import clean

    out = place / f"firefly-{workers or options.cores}.jsonl"
    began = time.perf_counter()
    clean([str(place / "rows" / "*.jsonl")], str(out), workers=workers or options.cores)
    return figures(options, out, time.perf_counter() - began, workers or options.cores)


def one_process(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Measures ``firefly clean`` in one process."""
    return firefly(options, place, 1)


def before(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Measures ``firefly clean`` of another checkout."""
    out = place / "before.jsonl"
    code = "import sys; from firefly_lightning.preparation.clean import clean; clean(sys.argv[1:2], sys.argv[2])"
    given = [sys.executable, "-c", code, str(place / "rows" / "*.jsonl"), str(out)]
    began = time.perf_counter()
    subprocess.run(given, check=True, cwd=options.before, env=os.environ | {"PYTHONPATH": str(options.before)})
    return figures(options, out, time.perf_counter() - began, 1)


def datatrove(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Measures datatrove's MinHash pipeline."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    # Its hashing by xxhash, the default, gives strings to xxhash, which releases from 4 on refuse.
    hashing = HashConfig(hash_fc="sha1")
    config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8, hash_config=hashing)
    work = place / "datatrove"
    signature = MinhashDedupSignature(str(work / "signatures"), config, characters())

    def reader() -> Any:
        return JsonlReader(str(place / "rows"), adapter=document)

    def run(tasks: int, *steps: Any) -> None:
        LocalPipelineExecutor(
            list(steps), tasks=tasks, workers=min(options.cores, tasks), skip_completed=False,
            logging_dir=str(work / "logs" / type(steps[-1]).__name__),
        ).run()  # fmt: skip

    began = time.perf_counter()
    run(SHARDS, reader(), signature)
    run(16, MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config))
    run(1, MinhashDedupCluster(str(work / "buckets"), str(work / "remove"), config=config))
    writer = JsonlWriter(str(work / "kept"), compression=None)
    run(SHARDS, reader(), MinhashDedupFilter(str(work / "remove")), writer)
    seconds = time.perf_counter() - began
    out = place / "datatrove.jsonl"
    with out.open("w", encoding="utf-8") as file:
        for part in sorted((work / "kept").glob("*.jsonl")):
            for line in part.read_text("utf-8").splitlines():
                file.write(json.dumps(json.loads(line)["metadata"]["row"], ensure_ascii=False) + "\n")
    return figures(options, out, seconds, options.cores)


def characters() -> Any:
    """Has datatrove take each character for a word, as its Chinese words need packages of their own."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Characters(WordTokenizer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("zh")

        def word_tokenize(self, text: str) -> list[str]:
            return list("".join(text.split()))

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return Characters()


def document(self: Any, row: dict[str, Any], path: str, id_in_file: int) -> dict[str, Any]:
    """A row as datatrove takes one: its text, and the row itself beside it."""
    return {"text": f"{row['input']}\n{row['target']}", "id": f"{path}/{id_in_file}", "metadata": {"row": row}}


RUNS = {"firefly": firefly, "one_process": one_process, "before": before, "datatrove": datatrove}


def figures(options: argparse.Namespace, out: Path, seconds: float, processes: int) -> dict[str, Any]:
    """What is said of a system; its memory is at most that of this process and as many of the largest of the others."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return {
        "rows": options.count,
        "kept": sum(1 for _ in out.open("rb")),
        "seconds": round(seconds, 1),
        "rows_per_second": round(options.count / seconds),
        "peak_rss_gb": round(peak_gb() + others * (processes if processes > 1 or "before" in out.name else 0), 2),
    }


def compared(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Whether this project's runs wrote the same bytes, and how many rows datatrove and it left out."""
    ours = place / f"firefly-{options.cores}.jsonl"
    same = [place / name for name in ("firefly-1.jsonl", "before.jsonl") if (place / name).exists()]
    result: dict[str, Any] = {"same_bytes": all(ours.read_bytes() == other.read_bytes() for other in same)}
    theirs = place / "datatrove.jsonl"
    if theirs.exists():
        counts = [as_counts(path) for path in (*sorted((place / "rows").glob("*")), ours, theirs)]
        rows, kept, other = sum(counts[:-2], start=type(counts[0])()), *counts[-2:]
        left, left_by_them = rows - kept, rows - other
        both = sum((left & left_by_them).values())
        result |= {
            "left_out_by_both": both,
            "left_out_by_firefly_only": sum(left.values()) - both,
            "left_out_by_datatrove_only": sum(left_by_them.values()) - both,
        }
    return result


def compared_systems(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences that compare the speed, and what was left out."""
    of = {line["system"]: line for line in lines if "system" in line}
    whole = next(line for line in lines if "same_bytes" in line)
    remarks = []
    for name, goal in (("before", " (goal 2.5)"), ("one_process", ""), ("datatrove", "")):
        if name in of:
            times = of["firefly"]["rows_per_second"] / of[name]["rows_per_second"]
            remarks.append(f"`firefly` does {times:.1f} times the rows a second of `{name}`{goal}.")
    if "before" in of:
        remarks.append(f"It writes {'the same bytes' if whole['same_bytes'] else 'OTHER bytes'} as before.")
    if "left_out_by_both" in whole:
        remarks.append(
            f"Both leave out {whole['left_out_by_both']:,} rows; firefly alone {whole['left_out_by_firefly_only']:,}, "
            f"datatrove alone {whole['left_out_by_datatrove_only']:,}, whose texts it does not compare."
        )
    return remarks


def as_counts(path: Path) -> Any:
    """How often each row is in a file."""
    from collections import Counter

    with path.open(encoding="utf-8") as file:
        return Counter(hash(tuple(sorted(json.loads(line).items()))) for line in file)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws rows a second and memory of each system as bars."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("rows_per_second", "peak_rss_gb"), ("rows a second", "GB"), strict=True
    ):
        bars = axes.barh([line["system"] for line in lines], [line[key] for line in lines], color="tab:blue")
        axes.bar_label(bars, padding=3, fmt="{:,.4g}")
        axes.set(xlabel=label)
        axes.margins(x=0.3)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
