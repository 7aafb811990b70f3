"""Makes pairs of a chosen and a rejected answer from instruction rows: a row's target, and another's of the same kind.

``python -m demo.pairs --rows FILES --out FILE [--limit N] [--seed S]``
"""

import argparse
import heapq
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import xxhash

from firefly_lightning.data.sources.records import find_sources
from firefly_lightning.data.sources.row_forms import Row, read_rows
from firefly_lightning.errors import FireflyError, one_line_errors


def write_pairs(rows: Sequence[str], out: Path, limit: int = 200, seed: int = 0) -> int:
    """Writes pairs of rows that are drawn, the same on every machine for one seed; returns their number.

    Args:
        rows: Files of instruction rows, or globs; of each row the first turn is taken.
        out: File for the pairs.
        limit: Pairs to write, as many of each kind.
        seed: Seed of the draw.

    Raises:
        FireflyError: If no kind has two rows with different targets.
    """
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for source in find_sources(rows):
        for row in read_rows(source):
            by_kind[row.kind].append(row)
    pairs = []
    for kind in sorted(by_kind):
        drawn = heapq.nsmallest(2 * -(-limit // len(by_kind)), by_kind[kind], key=lambda row: _rank(row, seed))
        # Those that are rejected are no other pair's chosen ones: a pair would teach the contrary of the other.
        asked, others = drawn[0::2], [row.turns[0][1] for row in drawn[1::2]]
        for at, row in enumerate(asked):
            question, chosen = row.turns[0]
            # The next one that says something else, in the order of the draw.
            if rejected := next((target for target in [*others[at:], *others[:at]] if target != chosen), None):
                pairs.append({"kind": kind, "input": question, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise FireflyError(f"{', '.join(rows)}: no kind has two rows with different targets; name other files")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs[:limit])
    out.write_text(text, "utf-8")
    print(f"{out}: {len(pairs[:limit])} pairs of {len(by_kind)} kinds")
    return len(pairs[:limit])


def _rank(row: Row, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}:{row.turns}".encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", required=True, help="files of instruction rows, or globs")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--limit", type=int, default=200, help="pairs to write (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other rows")
    arguments = parser.parse_args()
    with one_line_errors("demo.pairs"):
        write_pairs(arguments.rows, arguments.out, arguments.limit, arguments.seed)
