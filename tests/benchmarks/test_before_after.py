"""A checkout is measured beside another by the same scripts."""

import json

from benchmarks.before_after import compared
from tests.conftest import write_rows
from tests.support.helpers import ROOT, json_lines, run_benchmark


def test_builds_of_two_checkouts_are_compared(reviews, tmp_path):
    raw = [{"text": text[:60], "label": ["positive", "negative"][at % 2]} for at, text in enumerate(reviews[:60])]
    source = write_rows(tmp_path / "raw.jsonl", raw)
    own = ["--scripts", "build", "--rounds", 1, "--raw", f"SentimentAnalyze={source}", "--out", tmp_path / "both.png"]
    _, *lines = json_lines(run_benchmark("before_after", "--before", ROOT, *own))
    assert [(line["script"], line["what"], line["unit"]) for line in lines] == [
        ("build", "SentimentAnalyze", "rows_per_second"),
        ("build", "all kinds", "rows_per_second"),
    ]
    for line in lines:
        assert line["before"] > 100
        assert line["times_as_fast"] == round(line["after"] / line["before"], 2)
    assert (tmp_path / "both.png").stat().st_size > 5000


def test_what_became_slower_is_named():
    line = {"script": "start", "what": "firefly chat", "times_as_fast": 0.9}
    assert compared([json.loads('{"cpu": "some"}'), line]) == ["Slower by more than 7%: start, firefly chat (0.9)."]
    assert compared([line | {"times_as_fast": 0.95}]) == ["Slower by more than 7%: nothing."]
