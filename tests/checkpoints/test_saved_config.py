"""The table of settings that differ from a checkpoint's: right, and whatever it meets, no end of a run."""

import time

import pytest
import yaml

from firefly_lightning.checkpoints.saved_config import differences

NOW = yaml.safe_dump({"model": {"path": "m", "learning_rate": 0.1}, "data": {"files": ["a"]}, "config": None})
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))

BROKEN = {
    "bomb": BOMB,
    "bomb of merges": MERGES,
    "alias of itself": "a: &a [*a]",
    "Python tag": "a: !!python/object/apply:os.system ['touch ran']",
    "unknown tag": "a: !mine 1",
    "no YAML": "a: [",
    "flipped": NOW.replace(":", "\x01", 1),
    "tabs": "a:\n\t- b",
    "deep": "[" * 5000,
    "deep mappings": "".join(" " * n + "a:\n" for n in range(3000)),
    "a list": "- a",
    "empty": "",
    "two documents": "a: 1\n---\nb: 2",
    "number": 7,
    "list": ["a"],
    "bytes": b"a: 1",
    "long": "a: b\n" * 1_000_000,
    "many settings": "\n".join(f"a{n}: 1" for n in range(21_000)),
    "a key of a list": "? [a, b]\n: 1",
    "half a surrogate pair": "a: \ud800",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_configuration_that_cannot_be_read_is_said_in_a_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    said = differences(BROKEN[name], NOW)
    assert said.startswith("What differs from the checkpoint's settings is not shown: they cannot be read (")
    assert "\n" not in said
    assert len(said) < 400
    assert time.process_time() - started < 20
    assert not list(tmp_path.iterdir())


SHOWN = ["1", "[1, [2]]", "2026-01-01", "0x" + "f" * 6000, "!!binary aGk=", ".nan", "null", "'\x1b[31m'"]


@pytest.mark.parametrize("value", SHOWN)
def test_any_value_is_shown_in_a_line_of_its_own(value):
    said = differences(f"model:\n  path: m\n  learning_rate: {value}\n", NOW)
    assert all(line.isprintable() for line in said.splitlines())
    assert said.splitlines()[0].startswith(("Resumed with other settings", "What differs"))


def test_what_differs_is_shown_and_nothing_else():
    before = yaml.safe_dump({"model": {"path": "m", "learning_rate": 0.2}, "data": {"files": ["a"]}, "ckpt_path": "x"})
    assert differences(before, NOW).splitlines() == [
        "Resumed with other settings, which hold from here on:",
        "  setting              checkpoint  this run",
        "  model.learning_rate  0.2         0.1",
    ]
    assert differences(NOW, NOW) == differences(None, NOW) == ""
    shared = "a: &a {x: 1}\nb: *a\n"
    assert differences(shared, "a: {x: 1}\nb: {x: 1}\n") == "", "an alias is the value that it stands for"
