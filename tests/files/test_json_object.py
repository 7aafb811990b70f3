"""Objects in JSON files: what is written is read, and what is none is refused in one line."""

import pytest

from firefly_lightning.cli_errors import check_yaml
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.errors import FireflyError, MissingFileError
from firefly_lightning.files.json_object import read_json_object, write_json
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER, load_templates
from firefly_lightning.pruning.vocabulary import read_texts
from tests.support.helpers import raised_line


def test_what_is_written_is_read(tmp_path):
    content = {"名字": "流萤", "sizes": [1, 2.5, None]}
    write_json(content, tmp_path / "a.json")
    assert "流萤" in (tmp_path / "a.json").read_text("utf-8")
    assert read_json_object(tmp_path / "a.json", "mend it") == content


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"[1]", "must hold a JSON object, this is list"),
        (b"null", "must hold a JSON object, this is NoneType"),
    ],
)
def test_what_holds_no_object_is_refused(tmp_path, content, problem):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FireflyError, match=problem) as raised:
        read_json_object(tmp_path / "a.json", "mend it")
    line = raised_line(raised)
    assert line.startswith(f"{tmp_path / 'a.json'}: ")
    assert line.endswith("; mend it")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, kind in ((tmp_path / "nowhere.json", MissingFileError), (tmp_path, FireflyError)):
        with pytest.raises(kind, match=f"^{path}: ") as raised:
            read_json_object(path, "mend it")
        raised_line(raised)


ROWS = {
    "rows.jsonl": '{{"kind": "K", "input": "a", "target": "b"}}\n{row}\n',
    "rows.json": '[{{"kind": "K", "input": "a", "target": "b"}},\n{row}]',
}
TWICE = {
    "input": '{"kind": "K", "input": "one", "target": "b", "input": "two"}',
    "assistant": '{"conversation": [{"human": "a", "assistant": "one", "assistant": "one"}]}',
}


@pytest.mark.parametrize("key", TWICE)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_with_a_key_twice_is_refused_by_name(name, key, tmp_path):
    path = tmp_path / name
    path.write_text(ROWS[name].format(row=TWICE[key]))
    for read in (read_rows, read_texts):
        with pytest.raises(FireflyError, match=rf"{name}:2: not a row, has the key '{key}' twice; mend the line"):
            list(read(str(path)))
    with pytest.raises(FireflyError, match=f"{name}:2: not a row"):
        clean([str(path)], str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_json_file_with_a_key_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"n_layer": 2, "n_head": 4, "n_layer": 3}')
    with pytest.raises(FireflyError, match=r"config\.json: has the key 'n_layer' twice; mend it"):
        read_json_object(tmp_path / "config.json", "mend it")


CONFIGURATIONS = {
    "trainer:\n  max_steps: 1\ndata:\n  seed: 1\ntrainer:\n  devices: 1\n": "'trainer' twice, again on line 5",
    "data:\n  seed: 1\n  seed: 1\n": "'seed' twice, again on line 3",
    "a: [{b: 1, b: 2}]\n": "'b' twice, again on line 1",
    '{"a": 1,\n"a": 2}': "'a' twice, again on line 2",
    "a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: *x\n'1': 2\n1: 2\n": None,
}


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_a_configuration_with_a_key_twice_is_refused(text, tmp_path):
    """One of the two would hold in silence; merged keys, and keys that only look alike, are no mistake."""
    (tmp_path / "run.yaml").write_text(text)
    if CONFIGURATIONS[text] is None:
        check_yaml(tmp_path / "run.yaml")
        return
    with pytest.raises(FireflyError, match=rf"run\.yaml: has the key {CONFIGURATIONS[text]}"):
        check_yaml(tmp_path / "run.yaml")


def test_templates_with_a_key_twice_are_refused(tmp_path):
    text = (TEMPLATE_FOLDER / "Couplet.yaml").read_text("utf-8")
    (tmp_path / "Couplet.yaml").write_text(f"{text}\nkind: Couplet\n", "utf-8")
    with pytest.raises(FireflyError, match=r"Couplet\.yaml: has the key 'kind' twice, again on line"):
        load_templates("Couplet", tmp_path)
