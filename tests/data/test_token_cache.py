"""The token cache: right ids, never stale, never half-made."""

import importlib
import json
import linecache
import pickle
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from firefly_lightning.data import token_cache as tokenized
from firefly_lightning.data.counts_table import unused_fields
from firefly_lightning.data.row_batches import Cut
from firefly_lightning.data.sources.row_forms import RowRules
from firefly_lightning.data.token_cache import tokenize
from firefly_lightning.data.tokenized_rows import TokenizedRows
from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import partial_path
from firefly_lightning.huggingface import load_tokenizer
from firefly_lightning.prompt import PRESETS, PromptEncoder
from tests.conftest import write_rows
from tests.support.helpers import PATIENCE, forked


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return PromptEncoder(tokenizer, PRESETS["firefly"])


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_rows_hold_the_ids_of_the_published_form(tokenizer, encoder, rows_file, tmp_path):
    rows = TokenizedRows([tokenize(str(rows_file), encoder, 512, "truncate", tmp_path)], [str(rows_file)])
    fields = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()]
    assert len(rows) == len(fields) == 60
    for index, row in enumerate(fields):
        # The tokenizer itself reads <s> and </s> in the whole published string.
        assert rows[index].input_ids.tolist() == ids_of(tokenizer, f"<s>{row['input']}</s></s>{row['target']}</s>")
        turns = row["target"].split("</s>")
        learned = [len(ids_of(tokenizer, answer)) + 1 for answer in turns[::2]]
        assert rows[index].target_mask.sum() == rows.target_tokens[index] == sum(learned)
        assert rows[index].target_mask[-learned[-1] :].all()
        assert rows.lengths[index] == len(rows[index].input_ids)
        assert rows.kinds[rows.kind_ids[index]] == row["kind"]
    assert rows.describe(41) == f"{rows_file}:42 ({fields[41]['kind']})"


def long_rows(tmp_path):
    return write_rows(
        tmp_path / "long.jsonl",
        [
            {"kind": "A", "input": "好" * 30, "target": "是的" * 40},
            {"kind": "A", "input": "好" * 300, "target": "是的"},
            {"kind": "B", "input": "短", "target": "也短"},
        ],
    )


def test_no_row_of_a_long_file_is_lost(encoder, rows_file, tmp_path, monkeypatch):
    source = tmp_path / "many.jsonl"
    source.write_text(rows_file.read_text("utf-8") * 30, "utf-8")
    monkeypatch.setattr(tokenized, "ROWS_PER_BATCH", 128)
    rows = TokenizedRows([tokenize(str(source), encoder, 512, "truncate", tmp_path)], ["x"])
    assert len(rows) == sum(counts["rows"] for counts in rows.counts[0].values()) == 60 * 30
    for index in range(0, 1800, 77):
        assert np.array_equal(rows[index].input_ids, rows[index % 60].input_ids)
        assert rows.describe(index).startswith(f"x:{index + 1} ")


@pytest.mark.parametrize("policy", ["truncate", "truncate_keep_end", "drop"])
def test_too_long_rows(tokenizer, encoder, tmp_path, policy):
    source = long_rows(tmp_path)
    rows = TokenizedRows([tokenize(str(source), encoder, 40, policy, tmp_path)], [str(source)])
    counts = rows.counts[0]
    wholes = [
        ids_of(tokenizer, f"<s>{row['input']}</s></s>{row['target']}</s>")
        for row in map(json.loads, source.read_text("utf-8").splitlines())
    ]
    assert [len(whole) > 40 for whole in wholes] == [True, True, False]
    expected = {
        "truncate": [wholes[0][:40], wholes[2]],  # nothing of the second row's target is left
        "truncate_keep_end": [[1, *wholes[0][-39:]], [1, *wholes[1][-39:]], wholes[2]],
        "drop": [wholes[2]],
    }[policy]
    assert [rows[index].input_ids.tolist() for index in range(len(rows))] == expected
    lost = {"truncate": (2, 0, 1), "truncate_keep_end": (2, 0, 0), "drop": (0, 2, 0)}[policy]
    assert (counts["A"]["truncated"], counts["A"]["dropped"], counts["A"]["no_target"]) == lost
    assert (counts["A"]["rows"], counts["B"]["rows"]) == (2, 1)
    assert counts["B"]["tokens"] == len(wholes[2])


def test_a_complete_entry_is_reused(encoder, rows_file, tmp_path, monkeypatch):
    folder = tokenize(str(rows_file), encoder, 512, "truncate", tmp_path)
    monkeypatch.setattr(tokenized, "_write", lambda *args: pytest.fail("tokenised again"))
    assert tokenize(str(rows_file), encoder, 512, "truncate", tmp_path) == folder


def test_everything_that_matters_changes_the_key(tokenizer, encoder, rows_file, tmp_path, monkeypatch):
    other_file = tmp_path / "other.jsonl"
    other_file.write_text(rows_file.read_text("utf-8").replace("评论", "点评"), "utf-8")
    other_tokenizer = load_tokenizer(tokenizer.name_or_path)
    other_tokenizer.add_tokens(["酒店"])
    keys = [
        tokenized._key(str(rows_file), encoder, Cut(512, "truncate"), RowRules()),
        tokenized._key(str(other_file), encoder, Cut(512, "truncate"), RowRules()),
        tokenized._key(
            str(rows_file), PromptEncoder(other_tokenizer, encoder.prompt), Cut(512, "truncate"), RowRules()
        ),
        tokenized._key(
            str(rows_file), PromptEncoder(tokenizer, PRESETS["firefly_single"]), Cut(512, "truncate"), RowRules()
        ),
        tokenized._key(str(rows_file), encoder, Cut(511, "truncate"), RowRules()),
        tokenized._key(str(rows_file), encoder, Cut(512, "drop"), RowRules()),
        tokenized._key(str(rows_file), encoder, Cut(512, "truncate"), RowRules(learn="last")),
        tokenized._key(str(rows_file), encoder, Cut(512, "truncate"), RowRules(answering=True)),
        tokenized._key(str(rows_file), encoder, Cut(512, "truncate"), RowRules(document_per="file")),
        tokenized._key(str(rows_file), encoder, Cut(512, "truncate", 2), RowRules()),
    ]
    code = tmp_path / "code.py"
    code.write_text("changed = True\n")
    monkeypatch.setattr(tokenized, "_CODE", [*tokenized._CODE, str(code)])
    keys.append(tokenized._key(str(rows_file), encoder, Cut(512, "truncate"), RowRules()))
    assert len(set(keys)) == 11


def test_a_file_is_read_for_its_key_again_when_it_has_changed(encoder, rows_file, tmp_path, monkeypatch):
    source = tmp_path / "rows.jsonl"
    text = rows_file.read_text("utf-8")
    hashed, hash_files = [], tokenized._hash_files
    monkeypatch.setattr(tokenized, "_hash_files", lambda paths: hashed.extend(paths) or hash_files(paths))
    keys = []
    for content in (text, None, text.replace("评论", "点评")):  # as many bytes
        if content:
            source.write_text(content, "utf-8")
        keys.append(tokenized._key(str(source), encoder, Cut(512, "truncate"), RowRules()))
    assert keys[0] == keys[1] != keys[2]
    assert hashed.count(str(source)) == 2


def test_a_moved_file_keeps_its_key(encoder, rows_file, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows_file.read_bytes())
    assert tokenized._key(str(moved), encoder, Cut(512, "drop"), RowRules()) == tokenized._key(
        str(rows_file), encoder, Cut(512, "drop"), RowRules()
    )


def test_an_unfinished_entry_is_never_read(encoder, tmp_path):
    source = write_rows(tmp_path / "bad.jsonl", [{"kind": "A", "input": "好", "target": "是"}] * 5000)
    source.write_text(source.read_text("utf-8") + "{broken\n", "utf-8")  # in the second batch of rows
    cache = tmp_path / "cache"
    with pytest.raises(FireflyError, match=r"bad\.jsonl:5001: not JSON"):
        tokenize(str(source), encoder, 512, "truncate", cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_cleared(encoder, rows_file, tmp_path):
    key = tokenized._key(str(rows_file), encoder, Cut(512, "truncate"), RowRules())
    left_over = partial_path(tmp_path / key)
    left_over.mkdir()
    (left_over / "rows.arrow").write_bytes(b"half")
    folder = tokenize(str(rows_file), encoder, 512, "truncate", tmp_path)
    assert not left_over.exists()
    assert len(TokenizedRows([folder], ["x"])) == 60


def tokenize_and_say(model: Path, rows: Path, cache: Path, said: Path, most: int | None = None) -> None:
    """What a process does that may write no more than so many bytes of a file, as on a full disk."""
    if most:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    encoder = PromptEncoder(load_tokenizer(str(model)), PRESETS["firefly"])
    try:
        folder = tokenize(str(rows), encoder, 512, "truncate", cache)
        said.write_text(str(len(TokenizedRows([folder], ["x"]))))
    except FireflyError as error:
        said.write_text(f"FireflyError: {error}")


def test_two_processes_at_once(model_folder, rows_file, tmp_path):
    source = tmp_path / "many.jsonl"
    source.write_text(rows_file.read_text("utf-8") * 50, "utf-8")
    cache = tmp_path / "cache"
    said = [tmp_path / name for name in "ab"]
    for process in [forked(tokenize_and_say, model_folder, source, cache, path) for path in said]:
        process.join(PATIENCE)
    assert [path.read_text() for path in said] == ["3000", "3000"]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_full_disk_leaves_nothing(model_folder, rows_file, tmp_path):
    cache, said = tmp_path / "cache", tmp_path / "said"
    forked(tokenize_and_say, model_folder, rows_file, cache, said, 8192).join(PATIENCE)
    assert said.read_text().startswith(f"FireflyError: {cache}: ")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_rows_reach_a_worker_by_name(encoder, rows_file, tmp_path):
    rows = TokenizedRows([tokenize(str(rows_file), encoder, 512, "truncate", tmp_path)], ["x"])
    sent = pickle.dumps(rows)
    assert len(sent) < 1000, "content is mapped again, not sent"
    assert np.array_equal(pickle.loads(sent)[17].input_ids, rows[17].input_ids)


def test_several_sources_are_one_after_another(encoder, rows_file, tmp_path):
    second = write_rows(tmp_path / "b.jsonl", [{"instruction": "说好", "input": "", "output": "好"}])
    folders = [tokenize(str(source), encoder, 512, "truncate", tmp_path) for source in (rows_file, second)]
    rows = TokenizedRows(folders, ["a", "b"])
    assert len(rows) == 61
    assert rows.of_source(1).tolist() == [60]
    assert rows.describe(60) == "b:1 (Belle)"
    assert rows.describe(0).startswith("a:1 ")


def test_a_form_of_ones_own_is_read_anew_when_its_file_changes(encoder, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "在吗", "a": "在"}])
    monkeypatch.syspath_prepend(str(tmp_path))

    def made(code: str) -> TokenizedRows:
        (tmp_path / "own_rows.py").write_text(f"def read(fields):\n    return {code}\n", "utf-8")
        monkeypatch.delitem(sys.modules, "own_rows", raising=False)
        importlib.invalidate_caches()
        linecache.checkcache()
        row_format = importlib.import_module("own_rows").read
        return TokenizedRows([tokenize(str(rows), encoder, 512, "truncate", tmp_path, RowRules(row_format))], ["rows"])

    first, again = (made("'Chat', [(fields['q'], fields['a'])]") for _ in range(2))
    changed = made("'Longer kind', [(fields['q'], fields['a'])]")
    assert first.folders == again.folders != changed.folders
    assert (first.kinds, changed.kinds) == (["Chat"], ["Longer kind"])
    assert first[0].input_ids.tolist() == encoder.encode([[("在吗", "在")]])[0].input_ids
    with pytest.raises(FireflyError, match=r"data\.row_format: only a function of a file is taken"):
        tokenize(str(rows), encoder, 512, "truncate", tmp_path, RowRules(eval("lambda fields: None")))


TURNS = [("问一", "答一"), ("问二", "答二"), ("问三", "答三")]


@pytest.mark.parametrize(
    ("weights", "rules", "taught"),
    [
        ((1, 1, 1), RowRules(), (1, 1, 1)),
        ((0, 1, 0), RowRules(), (0, 1, 0)),
        ((1, 1, 1), RowRules(learn="last"), (0, 0, 1)),
        ((0, 1, 1), RowRules(learn="last"), (0, 0, 1)),
    ],
)
def test_only_chosen_turns_are_learned(encoder, tmp_path, weights, rules, taught):
    turns = [{"human": q, "assistant": a, "weight": weight} for (q, a), weight in zip(TURNS, weights, strict=True)]
    plain = {"kind": "K", "input": "在吗", "target": "在"}
    source = write_rows(tmp_path / "rows.jsonl", [plain, {"conversation": turns}, plain])
    rows = TokenizedRows([tokenize(str(source), encoder, 512, "truncate", tmp_path, rules)], ["x"])
    whole = encoder.encode([[("在吗", "在")], TURNS])
    assert [row.input_ids.tolist() for row in rows] == [whole[0].input_ids, whole[1].input_ids, whole[0].input_ids]
    expected, turn = [], 0
    for index, learned in enumerate(whole[1].target_mask):  # runs of learned tokens are the targets
        expected.append(bool(learned and taught[turn]))
        turn += learned and whole[1].target_mask[index + 1 : index + 2] != [True]
    assert rows[1].target_mask.tolist() == expected
    assert rows[0].target_mask.tolist() == rows[2].target_mask.tolist() == whole[0].target_mask
    assert rows.target_tokens[1] == sum(expected)


def test_a_row_of_which_nothing_is_learned_is_counted(encoder, tmp_path):
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "weight": 0}]
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}, {"instruction": "问", "output": "答"}])
    rows = TokenizedRows([tokenize(str(source), encoder, 512, "truncate", tmp_path)], ["x"])
    assert len(rows) == 1
    assert rows.counts[0]["Conversation"]["no_target"] == 1


def test_what_is_not_read_stays_known_with_the_cache(encoder, tmp_path):
    fields = [{"note": "一个说明", "half\ud800": "x"}, {"note": "又一个"}, {}, {"output": " "}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"instruction": "问", "output": "答"} | more) + "\n" for more in fields))
    for _ in range(2):
        rules = RowRules(counting_faults=True)
        rows = TokenizedRows([tokenize(str(source), encoder, 512, "truncate", tmp_path, rules)], ["x"])
        assert rows.unused == [{"note": 2, r"half\ud800": 1}]
        assert (rows.faults, len(rows)) == ([{"empty": 1}], 3)
    (line,) = unused_fields(rows)
    assert line == r"x: nothing is learned of the text in these fields, here with their rows: note (2), half\ud800 (1)"
