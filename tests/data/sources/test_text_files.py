"""Files that are compressed, in another encoding, cut off, or no text at all."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firefly_lightning.data.sources.records import find_sources, read_records
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.errors import FireflyError
from firefly_lightning.pruning.vocabulary import read_texts
from tests.support.helpers import raised_line

ROWS = [{"kind": "K", "input": f"第{at}问\n换行", "target": "春风又绿江南岸"} for at in range(700)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "kind,input,target\r\n" + "".join(f'{row["kind"]},"{row["input"]}",{row["target"]}\r\n' for row in ROWS)
CONTENTS = {".jsonl": LINES, ".json": json.dumps(ROWS), ".csv": TABLE, ".tsv": TABLE.replace(",", "\t")}


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


PACKERS = {".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_compressed_files_hold_the_same_rows(tmp_path, packing, suffix):
    pack = PACKERS[packing]
    path = tmp_path / f"rows{suffix}{packing}"
    path.write_bytes(pack(CONTENTS[suffix].encode()))
    assert list(read_records(str(path))) == list(enumerate(ROWS, 1))
    assert find_sources([str(tmp_path / "*.*")]) == [str(path)]
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])
    with pytest.raises(FireflyError, match=r"is damaged or cut off, .*; compress or download it again") as raised:
        list(read_records(str(path)))
    raised_line(raised)
    with pytest.raises(FireflyError, match="no such file"):
        find_sources([f"missing{suffix}{packing}"])


def test_a_compressed_file_is_known_by_its_bytes_and_may_have_several_parts(tmp_path):
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(gzip.compress(line.encode()) for line in lines[:50]))
    assert len(list(read_rows(str(tmp_path / "rows.jsonl")))) == 50
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(zstd(line.encode()) for line in lines[:50]))
    assert len(list(read_rows(str(tmp_path / "rows.jsonl.zst")))) == 50
    (tmp_path / "plain.jsonl.gz").write_text(LINES, "utf-8")
    assert len(list(read_rows(str(tmp_path / "plain.jsonl.gz")))) == 700
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(FireflyError, match="has no rows"):
        list(read_rows(str(tmp_path / "empty.jsonl.gz")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_other_encodings_are_read_by_their_mark(tmp_path, encoding, suffix):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    path = tmp_path / f"rows{suffix}"
    path.write_bytes((mark + CONTENTS[suffix]).encode(encoding))
    assert list(read_records(str(path))) == list(enumerate(ROWS, 1))
    packed = tmp_path / f"packed{suffix}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_records(str(packed))) == list(enumerate(ROWS, 1))


def test_damage_in_another_encoding_is_told_with_its_line(tmp_path):
    for suffix in (".jsonl", ".csv", ".json"):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(CONTENTS[suffix].encode("utf-16") + b"\x00\xd8")
        with pytest.raises(FireflyError, match=r"rows\.\w+:\d+: byte 0x.. is not UTF-16.*, which the mark"):
            list(read_records(str(path)))


def zipped(_: None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(LINES.encode())
        archive.addfile(member, io.BytesIO(LINES.encode()))
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (zipped(), "rows.jsonl", "is a zip archive or a spreadsheet; unpack it"),
        (tarred(), "rows.jsonl.gz", "is a tar archive; unpack it"),
        (parquet(), "rows.jsonl", r"is a Parquet file; name it \.parquet"),
        (gzip.compress(parquet()), "rows.parquet", "is a compressed Parquet file; unpack it"),
        (pa.compress(LINES.encode(), codec="lz4", asbytes=True), "rows.json", "is compressed by lz4; unpack it"),
        (b"SQLite format 3\0" + bytes(100), "rows.csv", "is an SQLite database; export"),
        (b"%PDF-1.7\n", "rows.json", "is a PDF"),
        (LINES.encode("utf-16-le"), "rows.jsonl", "is UTF-16 without the mark .* iconv -f UTF-16LE -t UTF-8"),
        (LINES.encode("utf-16-be"), "rows.jsonl", "is UTF-16 without the mark .* iconv -f UTF-16BE -t UTF-8"),
        (bytes(5000), "rows.jsonl", "is filled with zeros"),
        (LINES.encode("gb18030"), "rows.jsonl", "1: byte 0x.. is not UTF-8; convert .* iconv -f GB18030 -t UTF-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FireflyError, match=rf"{name}:? ?{message}") as raised:
        list(read_records(str(tmp_path / name)))
    raised_line(raised)


def test_a_corpus_may_be_compressed_too(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert len(list(read_texts(str(tmp_path / "rows.jsonl.gz")))) == 1400
    said = [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在", "weight": 0}]
    rows = [{"messages": said, "system": "你是客服"}, {"instruction": "问", "output": "答", "history": [["早", "好"]]}]
    (tmp_path / "today.jsonl.xz").write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    assert list(read_texts(str(tmp_path / "today.jsonl.xz"))) == ["你是客服\n在吗", "在", "早", "好", "问", "答"]
    text = "第一行\r\n\n第二行\u2028还是第二行"
    for name, content in (("a.txt.gz", gzip.compress(text.encode())), ("a.txt", text.encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        assert list(read_texts(str(tmp_path / name))) == ["第一行", "第二行\u2028还是第二行"]


def test_what_is_nested_too_deeply_is_no_row(tmp_path):
    def nested(depth: int) -> str:
        return json.dumps({"kind": "K", "input": "问", "target": "答", "x": 0}).replace("0", "[" * depth + "]" * depth)

    for suffix, wrap in ((".jsonl", "{}\n"), (".json", "[{}]")):
        path = tmp_path / f"rows{suffix}"
        for depth, deep in ((98, False), (100, True), (400, True), (3000, True), (100_000, True)):
            path.write_text(wrap.format(nested(depth)) if suffix == ".json" else nested(depth) + "\n")
            if deep:
                with pytest.raises(FireflyError, match=rf"rows{suffix}:1: not a row, "):
                    list(read_records(str(path)))
            else:
                assert len(list(read_rows(str(path)))) == 1
    wide = {"kind": "K", "input": "问", "target": "答", "x": [[] for _ in range(5000)]}
    path.write_text(json.dumps([wide]))
    assert len(list(read_rows(str(path)))) == 1


def test_a_table_of_odd_columns_is_told_in_one_line(tmp_path):
    path = tmp_path / "rows.parquet"
    odd = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"kind": ["K"], "input": ["问"], "target": ["答"], "note": odd}), path)
    with pytest.raises(FireflyError, match=r"rows\.parquet: not a readable Parquet file") as raised:
        list(read_rows(str(path)))
    raised_line(raised)


def test_a_column_that_is_there_twice_is_told(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["K"], ["问"], ["再问"], ["答"]], names=["kind", "input", "input", "target"]), path)
    with pytest.raises(FireflyError, match=r"rows\.parquet: has the column input twice; rename one of them") as raised:
        list(read_rows(str(path)))
    raised_line(raised)


def test_the_fields_of_a_row_that_has_thousands_do_not_fill_a_message(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({f"{at} {'长' * 5000}": at for at in range(100)}))
    with pytest.raises(FireflyError, match="and 88 more are none of the accepted forms") as raised:
        list(read_rows(str(tmp_path / "rows.jsonl")))
    assert len(str(raised.value)) < 1500
