"""Pairs made from rows: each with a target of its own and another's of the same kind."""

import json

import pytest

from demo.pairs import write_pairs
from firefly_lightning import FireflyError
from tests.conftest import write_rows


def test_pairs_are_of_one_kind_and_differ(rows_file, tmp_path):
    out = tmp_path / "pairs.jsonl"
    assert write_pairs([str(rows_file)], out, limit=21) == 21
    pairs = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()]
    first = {(row["kind"], row["input"]): row["target"].split("</s>")[0] for row in rows}
    targets = {kind: {target for (of, _), target in first.items() if of == kind} for kind, _ in first}
    for pair in pairs:
        assert pair["chosen"] == first[pair["kind"], pair["input"]]
        assert pair["rejected"] in targets[pair["kind"]] - {pair["chosen"]}
    asked = {(pair["kind"], pair["input"]) for pair in pairs}
    others = {(kind, target) for (kind, question), target in first.items() if (kind, question) not in asked}
    assert all((pair["kind"], pair["rejected"]) in others for pair in pairs), "no row that is asked is rejected too"
    assert {sum(pair["kind"] == kind for pair in pairs) for kind in targets} == {10, 11}
    again = tmp_path / "again.jsonl"
    write_pairs([str(rows_file)], again, limit=21)
    assert again.read_bytes() == out.read_bytes()


def test_rows_that_all_say_the_same_make_no_pairs(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"kind": "a", "input": f"{at}", "target": "b"} for at in range(3)])
    with pytest.raises(FireflyError, match="no kind has two rows with different targets"):
        write_pairs([str(file)], tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()
