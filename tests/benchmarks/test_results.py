"""RESULTS.md holds every figure that is kept, and the ratios that follow from them."""

import json

from benchmarks import results


def test_tables_and_ratios(tmp_path, monkeypatch):
    lines = [
        {"cpu": "Abacus 9000", "date": "2026-01-02", "rows": "a few"},
        {
            "system": "firefly",
            "dtype": "fp32",
            "tokens_per_second": 600.0,
            "peak_rss_gb": 1.5,
            "libraries_gb": 0.5,
            "state_gb": 0.25,
            "share_of_floor": 0.7,
        },
        {
            "system": "frugal",
            "dtype": "fp32",
            "tokens_per_second": 540.0,
            "peak_rss_gb": 1.2,
            "libraries_gb": 0.5,
            "state_gb": 0.25,
            "share_of_floor": 0.63,
        },
        {
            "system": "trainer",
            "dtype": "fp32",
            "tokens_per_second": 150.0,
            "peak_rss_gb": 6.0,
            "libraries_gb": 0.75,
            "state_gb": 0.25,
            "share_of_floor": 0.2,
        },
        {"profiled": "fp32", "products": 0.8, "all else": 0.2},
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "throughput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (tmp_path / "results" / "throughput.png").write_bytes(b"")
    (tmp_path / "results" / "profile-fp32.txt").write_text("", "utf-8")
    monkeypatch.setattr("sys.argv", ["results", "--dry", "--out", str(tmp_path)])
    results.main()
    text = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "cpu Abacus 9000, date 2026-01-02, rows a few." in text
    assert "| firefly | fp32 | 600.0 | 1.5 | 0.5 | 0.25 | 0.7 |" in text
    remark = "4.0 times the tokens/s of trainer (goal 4), 0.25 of its memory (goal 0.3), 0.15 of what is not fixed."
    assert f"- firefly, fp32: {remark}" in text
    assert "- frugal, fp32: 3.6 times the tokens/s of trainer (goal 4), 0.20 of its memory" in text
    kept = "of firefly's 1.5 GB, 0.75 are fixed, and 0.30 freed memory that glibc keeps"
    assert f"- fp32: {kept}; not to keep it takes 10% of the speed." in text
    assert "- fp32: where the time of firefly's operations goes: products 80.0%, all else 20.0%." in text
    assert "![Training](results/throughput.png)" in text
    assert "[profile-fp32.txt](results/profile-fp32.txt)" in text
    assert "Pruning" not in text


def test_pruning_is_held_against_the_pace_of_the_disk():
    moved = {"file_system": "ext4", "read_gb": 6.0}
    systems = [
        {"system": "firefly", "seconds": 10.0, "written_gb": 4.0, "same_weights": True},
        {"system": "linked", "seconds": 4.0, "written_gb": 4.0, "same_weights": True},
        {"system": "llmpruner", "seconds": 30.0, "written_gb": 4.5, "same_weights": True},
        {"system": "dd", "seconds": 9.6, "written_gb": 6.0},
    ]
    seconds = {line["system"]: line["seconds"] for line in systems}
    whole = {"of": "ext4", "seconds": seconds, "times_as_long": {"llmpruner": 3.0, "copy": 1.5}}
    shared = {"system": "firefly", "file_system": "xfs", "seconds": 2.0, "read_gb": 6.0, "written_gb": 4.0}
    other = {"of": "xfs", "seconds": {"firefly": 2.0, "llmpruner": 20.0}, "times_as_long": {"llmpruner": 10, "copy": 5}}
    lines = [*(line | moved for line in systems), whole, shared, other]
    weights, paces, disk, on_xfs = results.pruned(lines)
    assert weights == "Weights that stay are bit for bit the old ones in all."
    assert "On ext4, `firefly prune` is 3.0 times as fast as LLMPruner's way, with `--link` 7.5 (goal 5)" in paces
    assert "a bare copy takes 1.5 times as long" in paces
    assert "reads and writes 1.00 GB/s. Past the page cache the disk does 1.25: it takes 8 s" in disk
    assert "more than 3.8 times as fast as LLMPruner's" in disk
    assert "On xfs, `firefly prune` is 10 times as fast as LLMPruner's way (goal 5)" in on_xfs
    lines[1]["same_weights"] = False
    assert "NOT the old ones" in results.pruned(lines)[0]


def test_the_larger_tokenizer_is_beside_what_is_bounded():
    line = {"axis": "memory bound", "vocabularies": [1000, 5000], "peak_rss_gb": 4.0, "tokenizer_gb": 0.5}
    (remark,) = results.bounded([{"axis": "layers", "value": 4}, line | {"bound_gb": 3.75}])
    assert remark.startswith("At a vocabulary of 5,000, 3.50 GB beside the 0.5 that its tokenizer adds;")
    assert remark.endswith("are 3.75 GB.")
