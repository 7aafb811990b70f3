"""Rows cleaned in portions, on several cores, by several machines and after kills are those cleaned one by one."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rensa import RMinHash, RMinHashLSH

from firefly_lightning.data.sources.chunks import read_chunks, records_of
from firefly_lightning.data.sources.records import read_records
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.resumable import WorkFolder
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.cleaning import looking
from firefly_lightning.preparation.cleaning.duplicates import normalise
from firefly_lightning.preparation.cleaning.signed_rows import ChunkSigner
from tests.conftest import write_rows
from tests.support.helpers import raised_line

THRESHOLD, ROOT = 0.8, str(Path(__file__).parents[2])


def made_rows(reviews, count, seed=0):
    """Rows of real reviews: most of them alone, some the same as another, many nearly the same, some near chains."""
    chance, rows = random.Random(seed), []
    for number in range(count):
        how = chance.random()
        if rows and how < 0.5:
            text, target = rows[chance.randrange(len(rows))]
            if how < 0.4:  # some characters fewer, so that the copy of a copy may be no duplicate of the first
                at = chance.randrange(max(len(text) - 8, 1))
                text = text[:at] + text[at + chance.randrange(1, 8) :]
        else:
            text, target = reviews[number % len(reviews)] + str(number // len(reviews)), chance.choice(["好评", "差评"])
        rows.append((text, target))
    return [{"kind": chance.choice("AB"), "input": text, "target": target} for text, target in rows]


def kept_one_by_one(rows, forbidden):
    """Numbers of the rows that stay, and why each of the others does not, each compared with all that stay before."""

    def pieces(text):
        return {text[at : at + 5] for at in range(max(1, len(text) - 4))}

    def sign(row):
        signature = RMinHash(128, 1)
        signature.update(list(pieces(normalise(row["input"]) + normalise(row["target"]))))
        return signature

    def like(row, other):
        texts = [[normalise(one["input"]) + normalise(one["target"]), normalise(one["target"])] for one in (row, other)]
        if texts[0] == texts[1]:
            return 2
        of_both = [(pieces(one), pieces(two)) for one, two in zip(*texts, strict=True)]
        alike = [len(one & two) / len(one | two) for one, two in of_both]
        return alike[0] if min(alike) >= THRESHOLD else 0

    index, kept, reasons = RMinHashLSH(THRESHOLD, 128, 16), [], {}
    old = RMinHashLSH(THRESHOLD, 128, 16)
    for number, row in enumerate(forbidden):
        old.insert(number, sign(row))
    asked = {normalise(row["input"]) for row in forbidden}
    for number, row in enumerate(rows):
        signature = sign(row)
        if normalise(row["input"]) in asked or any(like(row, forbidden[key]) for key in old.query(signature)):
            reasons[number] = "in the validation rows"
            continue
        found = max((like(row, rows[key]) for key in index.query(signature)), default=0)
        if found:
            reasons[number] = "duplicate" if found == 2 else "near duplicate"
        else:
            index.insert(number, signature)
            kept.append(number)
    return kept, reasons


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(looking, "ROWS_PER_CHUNK", 40)


@pytest.mark.parametrize("workers", [1, 2])
def test_portions_leave_what_rows_one_by_one_do(tmp_path, reviews, small_portions, workers):
    rows, forbidden = made_rows(reviews[:200], 700), made_rows(reviews[:200], 60, seed=1)
    kept, reasons = kept_one_by_one(rows, forbidden)
    assert len(set(reasons.values())) == 3
    half = [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:333]), ("b", rows[333:]))]
    validation = write_rows(tmp_path / "validation.jsonl", forbidden)
    out = tmp_path / "out.jsonl"
    clean([*map(str, half)], str(out), [str(validation)], THRESHOLD, workers=workers)
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == [rows[number] for number in kept]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text("utf-8"))
    counts = report["counts"]["all"]
    assert {reason: counts[reason] for reason in set(reasons.values())} == {
        reason: list(reasons.values()).count(reason) for reason in set(reasons.values())
    }
    places = {f"{half[0]}:{at + 1}" if at < 333 else f"{half[1]}:{at - 332}": at for at in range(700)}
    for of_kind in report["examples"].values():
        for reason, examples in of_kind.items():
            for example in examples:
                assert reasons[places[example["where"]]] == reason
                like = example["like"]
                assert like.startswith(str(validation)) if "validation" in reason else places[like] in kept


AFTER_A_SMALL_ONE = """
import sys
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.cleaning import looking

looking.ROWS_PER_CHUNK = 500
rows, long, out = sys.argv[1:]
clean([long], out + ".long")
clean([rows], out, [long], workers=2)
"""


def test_many_portions_come_after_a_single_one(tmp_path, reviews):
    """A long text has the library of signatures begin threads, for which a process that is forked later would wait."""
    source = str(write_rows(tmp_path / "rows.jsonl", made_rows(reviews, 1200)))
    numbers = " ".join(map(str, range(40_000)))
    long = str(write_rows(tmp_path / "long.jsonl", [{"kind": "A", "input": numbers, "target": "是"}]))
    given = [sys.executable, "-c", AFTER_A_SMALL_ONE, source, long, str(tmp_path / "out.jsonl")]
    subprocess.run(given, check=True, capture_output=True, timeout=300)
    clean([source], str(tmp_path / "alone.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def clean_here(source, out):
    clean([source], out)


def test_a_daemonic_process_works_by_itself(tmp_path, reviews, small_portions):
    source = str(write_rows(tmp_path / "rows.jsonl", made_rows(reviews, 100)))
    clean([source], str(tmp_path / "alone.jsonl"))
    with multiprocessing.Pool(1) as pool:
        pool.apply(clean_here, (source, str(tmp_path / "out.jsonl")))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


LINES = st.lists(st.sampled_from(["", "  ", "\u3000", "\x1c", "\r", '{"a": 1}', ' {"a": 2}\r', "\t{}"]), max_size=12)


@given(LINES, st.sampled_from(["", "\n"]), st.booleans(), st.integers(1, 4))
@settings(max_examples=200)
def test_portions_hold_the_records_of_a_file(tmp_path_factory, lines, end, mark, size):
    path = tmp_path_factory.mktemp("portions") / "rows.jsonl"
    text = "\n".join(lines) + end
    content = ("\ufeff" * mark + text).encode()
    path.write_bytes(content)
    expected = list(read_records(str(path)))
    chunks = list(read_chunks(str(path), size))
    assert [len(list(records_of(chunk))) for chunk in chunks] == [chunk.size for chunk in chunks]
    assert all(chunk.size == size for chunk in chunks[:-1])
    assert [one for chunk in chunks for one in records_of(chunk)] == expected
    for name, changed in (("rows.jsonl.gz", gzip.compress(content)), ("wide.jsonl", text.encode("utf-16"))):
        path.with_name(name).write_bytes(changed)
        found = [one for chunk in read_chunks(str(path.with_name(name)), size) for one in records_of(chunk)]
        assert found == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n[1]\n', "rows.jsonl:3: a row must be a JSON object, this is list"),
        (b'{"a": 1}\n{"a": \xff}\n', "rows.jsonl:2: byte 0xff is not UTF-8"),
        (b'{"a": 1}\n{"a": 1, "a": 2}\n', "rows.jsonl:2: not a row, has the key 'a' twice"),
    ],
)
def test_mistakes_in_a_later_portion_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(looking, "ROWS_PER_CHUNK", 1)
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(FireflyError, match=message) as raised:
        clean([str(tmp_path / "rows.jsonl")], str(tmp_path / "out.jsonl"), workers=2)
    raised_line(raised)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.cleaning import looking
looking.ROWS_PER_CHUNK = 20
look = looking.ChunkSigner.__call__
def slowly(*given):
    time.sleep(float(sys.argv[4]))
    return look(*given)
looking.ChunkSigner.__call__ = slowly
clean([sys.argv[1]], sys.argv[2], workers=int(sys.argv[3]))
"""


def started(source, out, workers=2, pause=0.0):
    given = [sys.executable, "-c", COMMAND, str(source), str(out), str(workers), str(pause)]
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_writes_the_same(tmp_path, reviews, number):
    source = write_rows(tmp_path / "rows.jsonl", made_rows(reviews, 600))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert started(source, whole).wait() == 0
    run = started(source, out, pause=0.2)
    while len(list(tmp_path.glob(".out.jsonl.work-*/*.arrow"))) < 4:
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, number)
    assert run.wait() != 0
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.jsonl.work-*/*.arrow")}
    assert 4 <= len(before) < 30
    run = started(source, out, pause=0.3)
    while len(after := list(tmp_path.glob(".out.jsonl.work-*/*.arrow"))) <= len(before):
        assert run.poll() is None
        time.sleep(0.01)
    assert all(path.stat().st_mtime_ns == before.get(path, path.stat().st_mtime_ns) for path in after)
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert f"going on with {len(before)} portions" in said
    for name in ("{}", "{}.report.json"):
        assert (tmp_path / name.format("out.jsonl")).read_bytes() == (
            tmp_path / name.format("whole.jsonl")
        ).read_bytes()
    assert not list(tmp_path.glob(".*"))


class Killed(ChunkSigner):
    """Is killed, as by a system that is out of memory, at the sixth portion."""

    def __call__(self, portion):
        if portion[0].stem.endswith("5"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(portion)


def test_a_run_whose_worker_is_killed_goes_on(tmp_path, reviews, small_portions, monkeypatch, capsys):
    source = str(write_rows(tmp_path / "rows.jsonl", made_rows(reviews, 400)))
    clean([source], str(tmp_path / "whole.jsonl"))
    out = str(tmp_path / "out.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(looking, "ChunkSigner", Killed)
        with pytest.raises(FireflyError, match=r"^a worker process was killed"):
            clean([source], out, workers=2)
    capsys.readouterr()
    clean([source], out)
    assert "going on with " in capsys.readouterr().out
    assert Path(out).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_parts_done_elsewhere_are_found(tmp_path, reviews, small_portions, capsys):
    source = str(write_rows(tmp_path / "rows.jsonl", made_rows(reviews, 400)))
    clean([source], str(tmp_path / "whole.jsonl"))
    out = str(tmp_path / "out.jsonl")
    for part in ("1/3", "2/3", "3/3"):
        clean([source], out, share=part)
        assert not Path(out).exists()
    assert len(list(tmp_path.glob(".out.jsonl.work-*/*.arrow"))) == 10
    capsys.readouterr()
    clean([source], out)
    assert "going on with 10 portions" in capsys.readouterr().out
    assert Path(out).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for wrong in ("0/3", "4/3", "3", "1/0", "a/b"):
        with pytest.raises(FireflyError, match=f"--share {wrong}: must be PART/PARTS"):
            clean([source], str(tmp_path / "none.jsonl"), share=wrong)


ON_A_CLUSTER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from firefly_lightning.preparation.clean import clean
from firefly_lightning.preparation.cleaning import looking

files, out = sys.argv[1:2], sys.argv[2]
looking.ROWS_PER_CHUNK = 40

def look_at_a_share(data, rank=0, world_size=1):
    clean(files, out, share=f"{rank + 1}/{world_size}", workers=1)
    return ()

if __name__ == "__main__":
    LocalPipelineExecutor([look_at_a_share], tasks=4, workers=2, logging_dir=sys.argv[3]).run()
    clean(files, out)
"""


def test_datatrove_spreads_the_work(tmp_path, reviews, small_portions):
    """On the engine's own executor with two workers."""
    source = str(write_rows(tmp_path / "rows.jsonl", made_rows(reviews, 300)))
    clean([source], str(tmp_path / "whole.jsonl"))
    given = [source, str(tmp_path / "out.jsonl"), str(tmp_path / "logs")]
    (tmp_path / "run.py").write_text(ON_A_CLUSTER)
    command = [sys.executable, str(tmp_path / "run.py"), *given]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert "going on with 8 portions" in run.stdout
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def ended_by(target, identity, error):
    """The folder of some work that an error ends, after it made a piece and found what others may do."""
    with WorkFolder(target, identity) as folder:
        (folder.path / "piece").touch()
        run = subprocess.run([sys.executable, "-c", LOCKED, str(target), identity], capture_output=True, text=True)
        assert "another process is writing it" in run.stderr
        raise error(folder.path)


def test_a_work_folder_is_of_one_process_and_one_identity(tmp_path):
    target = tmp_path / "out[1].jsonl"
    with pytest.raises(KeyboardInterrupt) as killed:
        ended_by(target, "x", KeyboardInterrupt)
    (left,) = killed.value.args
    assert (left / "piece").exists()
    with WorkFolder(target, "y", "1-of-2") as other:
        assert (left / "piece").exists(), "who shares removes nothing"
    assert other.path.exists()
    with pytest.raises(ValueError, match="work-") as ended:
        ended_by(target, "y", ValueError)
    assert not ended.value.args[0].exists()
    assert not left.exists()


LOCKED = """
import sys
from pathlib import Path
from firefly_lightning.files.resumable import WorkFolder
WorkFolder(Path(sys.argv[1]), sys.argv[2]).__enter__()
"""


SHARING = """
import sys
from pathlib import Path
from firefly_lightning.files.resumable import WorkFolder
WorkFolder(Path(sys.argv[1]), "x", sys.argv[2]).__enter__()
"""


def test_a_share_is_of_one_process(tmp_path):
    target = tmp_path / "out.jsonl"

    def taken_elsewhere(name: str) -> str:
        given = [sys.executable, "-c", SHARING, str(target), name]
        return subprocess.run(given, capture_output=True, text=True).stderr

    with WorkFolder(target, "x", "2-of-3"):
        assert f"{target}: another process is writing it" in taken_elsewhere("2-of-3")
        assert taken_elsewhere("1-of-3") == ""
    assert taken_elsewhere("2-of-3") == ""
