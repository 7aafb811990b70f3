"""``firefly clean``: picks the rows that are worth training on."""

import json
import re
from pathlib import Path
from typing import Literal

from firefly_lightning.data.sources.records import find_sources, identify_source
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import check_new_file, new_file
from firefly_lightning.files.resumable import WorkFolder


def clean(
    files: list[str],
    out: str,
    val_files: list[str] | None = None,
    near_duplicates: float = 0.8,
    min_characters: int = 0,
    max_characters: int | None = None,
    report: str | None = None,
    document_per: Literal["line", "file"] = "line",
    workers: int | None = None,
    share: str | None = None,
) -> None:
    """Leaves out rows that would spoil a training: broken, empty, repeated, or in the validation rows.

    Takes instruction rows, documents and pairs of answers in any accepted form, also several forms in one file, and raw
    task rows; rows that are kept are written as they were, documents of ``.txt`` files as ``{"text": …}``. Of
    duplicates the first is kept. Rows that are left out are counted by kind and reason, with examples in the report. A
    run that was killed goes on where it was when the same command is given again.

    Args:
        files: Files to clean (.jsonl, .json, .csv, .tsv, .parquet, .txt), globs, or datasets of the Hugging Face hub.
        out: The .jsonl file to write.
        val_files: Rows that must not be trained on: a row that equals or nearly equals one of them, or asks the same
            question, is left out.
        near_duplicates: Jaccard similarity of character 5-grams from which on two rows are near duplicates; 1 leaves
            out exact duplicates only. Of rows that are less alike than 0.8, many are not found.
        min_characters: Fewest characters of a row's whole text; shorter rows are left out.
        max_characters: Most characters of a row's whole text; longer rows are left out.
        report: The .json file with counts and examples; OUT.report.json by default.
        document_per: What of a .txt file is a document, as in ``data.document_per``.
        workers: Number of processes to work with; one for each core by default.
        share: PART/PARTS, such as 3/8, to do a part of the work only, which the same command without it then finds
            done: for many machines with one disk.

    Raises:
        FireflyError: If a file cannot be read or written, or nothing is left.
    """
    from firefly_lightning.preparation.cleaning.choice import Chooser
    from firefly_lightning.preparation.cleaning.compared_texts import opened
    from firefly_lightning.preparation.cleaning.findings import Findings
    from firefly_lightning.preparation.cleaning.looking import CODE, ROWS_PER_CHUNK, Looking, write_kept
    from firefly_lightning.preparation.cleaning.signed_rows import SignedRows

    if not 0 < near_duplicates <= 1:
        raise FireflyError(f"--near_duplicates {near_duplicates}: must be above 0 and at most 1")
    if workers is not None and workers < 1:
        raise FireflyError(f"--workers {workers}: must be at least 1")
    if max_characters is not None and max_characters < min_characters:
        raise FireflyError(f"--max_characters {max_characters}: must be at least --min_characters {min_characters}")
    part = _part(share) if share else None
    sources, validation = find_sources(files), find_sources(val_files or [])
    inputs = [*sources, *validation]
    target = Path(out).expanduser().resolve()
    reported = Path(report).expanduser().resolve() if report else Path(f"{target}.report.json")
    check_new_file(target, inputs)
    check_new_file(reported, inputs)
    if reported == target:
        raise FireflyError(f"--report {report}: is also --out; write to another file")
    how = [min_characters, max_characters, document_per, ROWS_PER_CHUNK, CODE]
    identity = [len(sources), *map(identify_source, inputs), *how]
    with WorkFolder(target, json.dumps(identity), "{}-of-{}".format(*part) if part else None) as folder:
        looking = Looking(folder.path, document_per, workers, part or (1, 1))
        looking.tell_of_earlier_run(out)
        forbidden = looking.at(validation, "validation rows", None)
        tables = looking.at(sources, "cleaning", range(min_characters, (max_characters or 2**62) + 1))
        if part:
            return
        if not tables:
            raise FireflyError(f"{', '.join(sources)}: has no rows; fill it or remove it from the list")
        rows, findings = SignedRows([*forbidden, *tables], len(forbidden)), Findings()
        chooser = Chooser(rows, near_duplicates, findings, workers)
        try:
            chooser.choose()
        finally:
            opened.cache_clear()
        if not findings.kept:
            raise FireflyError(f"{', '.join(sources)}: nothing is left of {findings.read} rows: {findings.reasons()}")
        with new_file(target, inputs) as file, new_file(reported, inputs) as written:
            write_kept(rows, chooser.kept, file)
            written.write(json.dumps(findings.as_json(), ensure_ascii=False, indent=1).encode())
    print("\n".join([findings.table(out), *findings.hints()]))


def _part(share: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise FireflyError(f"--share {share}: must be PART/PARTS, such as 3/8 for the third of eight parts")
    return part, parts
