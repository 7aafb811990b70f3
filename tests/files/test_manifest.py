"""Lists of files by which any damage is found, and which are checked before anything in them is used."""

import json

import pytest
import xxhash

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.manifest import (
    check_files,
    check_listed,
    entry_of,
    listed_files,
    read_manifest,
    write_manifest,
)
from tests.support.helpers import raised_line

CURE = "do something"
CONTENTS = {"a": b"", "b.bin": b"b" * 3_000_000, "inner/c": bytes(range(256))}
VALUES = [None, True, 0, -1, 1.5, 10**9, "x", [], [1], {}, {"a": 1}]


@pytest.fixture
def listed(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path / "list", {name: entry_of(tmp_path / name) for name in CONTENTS}, more=1)
    return tmp_path / "list"


def check(path):
    manifest = read_manifest(path, CURE)
    entries = listed_files(path, manifest, CURE)
    check_files(path.parent, entries, CURE)
    return entries, manifest


def forge(path, manifest):
    """Writes a list as somebody would who knows its form."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    path.write_text(json.dumps(manifest | {"xxh3_128": digest}, indent=1) + "\n")


def test_sizes_and_digests_are_those_of_the_files(listed):
    entries, manifest = check(listed)
    expected = {
        name: {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        for name, content in CONTENTS.items()
    }
    assert entries == expected
    assert manifest["more"] == 1


def test_every_byte_of_the_list_counts(listed):
    whole = listed.read_bytes()
    for place in range(len(whole)):
        listed.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FireflyError) as raised:
            check(listed)
        assert raised_line(raised) == f"{listed}: damaged; {CURE}"
    for other in (whole[:-1], whole + b"\n", b"", b"[" * 100_000, b"null", b"\xff", whole.replace(b" ", b"  ")):
        listed.write_bytes(other)
        with pytest.raises(FireflyError, match="damaged"):
            check(listed)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_cut_changed_or_gone_is_named(listed, name):
    file, content = listed.parent / name, CONTENTS[name]
    changed = [(content + b"x", "bytes, not"), (None, "missing")]
    changed += [(content[:-1], "bytes, not"), (content[:-1] + b"x", "its contents have changed")] if content else []
    for damaged, message in changed:
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(FireflyError, match=message) as raised:
            check(listed)
        assert raised_line(raised).startswith(f"{file}: ")
        file.write_bytes(content)
    check(listed)


ELSEWHERE = ["..", "../x", "inner/../../x", "/etc/passwd", "", ".", "a/", "a//b", "a\0", "/" * 999]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_file_elsewhere_is_not_opened(listed, name):
    manifest = read_manifest(listed, CURE)
    manifest["files"][name] = manifest["files"]["a"]
    forge(listed, manifest)
    with pytest.raises(FireflyError, match="which is no file of its folder") as raised:
        check(listed)
    assert raised_line(raised).startswith(f"{listed}: ")


PLACES = [["files"], ["files", "a"], ["files", "a", "bytes"], ["files", "a", "xxh3_128"]]


RIGHT = [(["files"], {}), (["files", "a", "bytes"], 0)]


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path in PLACES for value in VALUES if (path, value) not in RIGHT], ids=str
)
def test_every_kind_of_value_in_every_place(listed, path, value):
    *outer, last = path
    manifest = inner = read_manifest(listed, CURE)
    for key in outer:
        inner = inner[key]
    inner[last] = value
    forge(listed, manifest)
    with pytest.raises(FireflyError) as raised:
        check(listed)
    assert raised_line(raised).endswith(CURE)


def test_what_a_list_lacks_is_named(listed):
    entries, _ = check(listed)
    check_listed(listed, entries, ["a", "inner/c"], CURE)
    with pytest.raises(FireflyError, match="does not list d, e; do something"):
        check_listed(listed, entries, ["e", "a", "d"], CURE)
