"""Tables fit the width that they are shown in, and lose nothing."""

import html
import os
import re

import pytest
from rich.cells import cell_len

from firefly_lightning.console import escaped, markdown, new_table, render

KINDS = ["对联", "SentimentAnalyze", "[/x] [bold]b[/bold] :smile:", "a|b"]
HEADINGS = ["rows read", "share", "mean tokens", "last turn not answered", "over 512", "tokens kept", "90 %"]
NUMBERS = [[f"{(row + 1) * 10 ** (column + 1):,}" for column in range(len(HEADINGS))] for row in range(len(KINDS))]


@pytest.fixture
def table():
    made = new_table(title="first.jsonl, second.jsonl")
    made.add_column("kind")
    for heading in HEADINGS:
        made.add_column(heading, justify="right")
    for kind, numbers in zip(KINDS, NUMBERS, strict=True):
        made.add_row(kind, *numbers)
    return made


@pytest.mark.parametrize("width", [50, 60, 80, 81, 100, 120, 200])
def test_a_table_fits_its_width_and_cuts_nothing(table, width):
    title, *lines = render(table, width).splitlines()
    assert title == "first.jsonl, second.jsonl"
    assert max(map(cell_len, lines)) <= width
    for kind, numbers in zip(KINDS, NUMBERS, strict=True):
        of_kind = [line.strip().removeprefix(kind) for line in lines if line.strip().startswith(f"{kind} ")]
        assert " ".join(of_kind).split() == numbers, "in this order, and each whole"
    words = " ".join(lines).split()
    assert all(word in words for heading in HEADINGS for word in heading.split())


def test_a_wide_terminal_has_one_table_and_a_narrow_one_several(table):
    starts = [render(table, width).count("kind") for width in (200, 80, 50)]
    assert starts[0] == 1 < starts[1] < starts[2]


def test_a_name_wider_than_the_terminal_is_folded_and_not_cut():
    made = new_table()
    made.add_column("kind")
    made.add_column("rows", justify="right")
    made.add_row("很长的类型名字" * 10, "1,234,567")
    text = render(made, 40)
    assert max(map(cell_len, text.splitlines())) <= 40
    assert "1,234,567" in text
    assert "".join(re.findall("[一-鿿]", text)) == "很长的类型名字" * 10


@pytest.mark.parametrize("columns", [60, 200])
def test_the_width_is_that_of_the_terminal(table, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert render(table) == render(table, columns)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda *stream: os.terminal_size((columns, 24)))
    assert render(table) == render(table, columns)


def test_markdown_has_every_cell_of_a_row_in_its_line(table):
    title, blank, *lines = markdown(table).splitlines()
    assert (title, blank) == ("first.jsonl, second.jsonl", "")
    cells = [re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]
    assert cells[0] == ["kind", *HEADINGS]
    assert cells[1] == ["---", *["---:"] * len(HEADINGS)]
    shown = ["对联", "SentimentAnalyze", "\\[/x\\] \\[bold\\]b\\[/bold\\] :smile:", "a\\|b"]
    assert cells[2:] == [[kind, *numbers] for kind, numbers in zip(shown, NUMBERS, strict=True)]


def test_what_would_be_a_mark_of_markdown_stands_for_itself():
    from markdown import markdown as as_html

    for text in ("*重要*", "<b>粗</b>", "[链接](http://x)", "`code`", "\\*", "对联"):
        assert html.unescape(as_html(escaped(text))) == f"<p>{text}</p>"
    assert escaped("a|b, $x$") == "a\\|b, \\$x\\$"
