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
    assert "- fp32: where the time of firefly's operations goes: products 80.0%, all else 20.0%." in text
    assert "![Training](results/throughput.png)" in text
    assert "[profile-fp32.txt](results/profile-fp32.txt)" in text
    assert "Pruning" not in text
