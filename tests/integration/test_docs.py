"""What the documentation reads from the code when it is built."""

import importlib.util

import pytest
import torch
import yaml

from tests.support.helpers import ROOT, run
from tests.support.readme import page

if torch.__version__.startswith("2.5."):
    # `bin/test` builds the documentation with the current stack; there, a missing package is a failure.
    pytest.skip("the oldest stack is without the extra docs", allow_module_level=True)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def groups(hooks) -> dict[str, str]:
    """Classes by the group of keys that the page says their arguments are."""
    found = [dict(hooks.KEYS.findall(page("training", language))) for language in ("en", "zh")]
    assert found[0] == found[1]
    assert len(found[0]) == 6
    return found[0]


def test_the_table_of_keys_has_those_that_firefly_fit_takes_with_their_defaults(hooks, groups):
    printed = yaml.safe_load(run("firefly-fit", "fit", "--model.path", "x", "--print_config").stdout)
    for group, path in groups.items():
        taken = printed[group].get("init_args", printed[group])
        written = hooks.arguments(path)
        assert list(written) == list(taken), group
        for name, (_, default, meaning) in written.items():
            assert meaning.endswith("."), name
            if default is not None:
                value = yaml.safe_load(default.replace("None", "null").replace("(", "[").replace(")", "]"))
                told = taken[name]
                assert value == told or float(value) == float(told), (group, name)


def test_every_key_has_a_chinese_description(hooks, groups):
    translated = hooks.translations()
    assert {group: list(told) for group, told in translated.items()} == {
        group: list(hooks.arguments(path)) for group, path in groups.items()
    }


def test_tables_are_put_in_the_places_of_their_comments(hooks):
    line = "<!-- keys model of firefly_lightning.module.FireflyModule -->"
    english, chinese = (hooks.fill(line, language) for language in ("en", "zh"))
    for table in (english, chinese):
        rows = table.splitlines()
        assert len(rows) == 2 + len(hooks.arguments("firefly_lightning.module.FireflyModule"))
        assert all(row.count("|") - row.count("\\|") == 4 for row in rows)
        assert ":mod:" not in table
    assert "| `model.attention`<br><small>auto, sdpa, eager</small> | `auto` |" in english
    assert "必填" in chinese


def test_lines_of_a_chinese_paragraph_are_joined(hooks):
    text = "第一行，\n第二行 word\n第三行\n`code`。\n\n```text\n甲\n乙\n```\n"
    joined = hooks.join_lines(text)
    assert joined == "第一行，第二行 word\n第三行`code`。\n\n```text\n甲\n乙\n```\n"


def test_long_names_in_tables_may_break_between_their_parts_and_nowhere_else(hooks):
    html = "<p><code>data.max_length</code></p><table><td>a <code>data.max_length: 1.5</code> b</td></table>"
    shown = "<td>a <code>data.<wbr>max_<wbr>length: 1.<wbr>5</code> b</td>"
    assert hooks.on_page_content(html) == f"<p><code>data.max_length</code></p><table>{shown}</table>"


def test_what_a_page_loads_from_another_host_is_found(hooks):
    found = hooks._ELSEWHERE.findall
    assert found('<script src="https://a.b/c.js"></script><img alt="x" src=//d.e/f.png>') == [
        "https://a.b/c.js",
        "//d.e/f.png",
    ]
    assert not found('<a href="https://a.b/">x</a><link href="styles/site.css"><img src="images/loss.png">')
