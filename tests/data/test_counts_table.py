"""The table of what was kept of each kind."""

from firefly_lightning.data.counts_table import HEADINGS, counts_table
from firefly_lightning.data.tokenized_rows import COUNTED


def test_the_table_adds_sources_up_and_cuts_no_word():
    first = {"SentimentAnalyze": dict(zip(COUNTED, (1_650_000, 0, 20, 3, 4, 5, 300_000_000, 100_000_000), strict=True))}
    second = {
        "SentimentAnalyze": dict.fromkeys(COUNTED, 1) | {"windows": 0},
        "Belle": dict.fromkeys(COUNTED, 2) | {"windows": 0},
    }
    lines = [line.split() for line in counts_table(["a.jsonl", "b.jsonl"], [first, second]).splitlines()]
    assert ["SentimentAnalyze", "1,650,001", "21", "4", "5", "6", "300,000,001", "100,000,001"] in lines
    assert ["Belle", *["2"] * 7] in lines
    assert ["all", "1,650,003", "23", "6", "7", "8", "300,000,003", "100,000,003"] in lines
    words = [word for line in lines for word in line]
    assert all(word in words for name, heading in HEADINGS.items() if name != "windows" for word in heading.split())
    assert "windows" not in words


def test_windows_are_shown_where_there_are_documents():
    counts = {"Text": dict.fromkeys(COUNTED, 3), "Belle": dict.fromkeys(COUNTED, 2) | {"windows": 0}}
    lines = [line.split() for line in counts_table(["a.jsonl"], [counts]).splitlines()]
    assert ["Text", *["3"] * 8] in lines
    assert ["Belle", "2", "0", *["2"] * 6] in lines


def test_a_kind_called_all_and_one_like_markup_have_lines_of_their_own():
    counts = {"all": dict.fromkeys(COUNTED, 1), "[/x]": dict.fromkeys(COUNTED, 2)}
    lines = [line.split() for line in counts_table(["[/y].jsonl"], [counts]).splitlines()]
    assert ["[/y].jsonl"] in lines
    assert ["all", "(a", "kind)", *["1"] * 8] in lines
    assert ["[/x]", *["2"] * 8] in lines
    assert ["all", *["3"] * 8] in lines
