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
    lines = [
        {"system": "firefly", "seconds": 10.0, "read_gb": 6.0, "written_gb": 4.0, "same_weights": True},
        {"system": "llmpruner", "seconds": 30.0, "read_gb": 6.0, "written_gb": 4.5, "same_weights": True},
        {"system": "copy", "seconds": 15.0, "read_gb": 6.0, "written_gb": 6.0},
        {"system": "dd", "seconds": 9.6, "read_gb": 6.0, "written_gb": 6.0},
        {"times_as_long": {"llmpruner": 3.0, "copy": 1.5, "dd": 0.96}},
    ]
    paces, weights, disk = results.pruned(lines)
    assert (
        "3.0 times as long as `firefly prune` (goal 5), a bare copy 1.5; `firefly prune` reads and writes 1.00" in paces
    )
    assert weights == "Weights that stay are bit for bit the old ones in both."
    assert "this disk does 1.25 GB/s: it takes 8 s" in disk
    assert "more than 3.8 times as fast as LLMPruner's" in disk
    lines[1]["same_weights"] = False
    assert "NOT the old ones" in results.pruned(lines)[1]
    assert len(results.pruned([line for line in lines if line.get("system") != "dd"])) == 2


def test_the_larger_tokenizer_is_beside_what_is_bounded():
    line = {"axis": "memory bound", "vocabularies": [1000, 5000], "peak_rss_gb": 4.0, "tokenizer_gb": 0.5}
    (remark,) = results.bounded([{"axis": "layers", "value": 4}, line | {"bound_gb": 3.75}])
    assert remark.startswith("At a vocabulary of 5,000, 3.50 GB beside the 0.5 that its tokenizer adds;")
    assert remark.endswith("are 3.75 GB.")
