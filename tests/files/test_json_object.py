"""Objects in JSON files: what is written is read, and what is none is refused in one line."""

import pytest

from firefly_lightning.errors import FireflyError, MissingFileError
from firefly_lightning.files.json_object import read_json_object, write_json
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
