"""Pairs as token ids, planned and collated; what is cut away or left out is counted by pair."""

import json

import numpy as np
import pytest
import torch

from firefly_lightning import FireflyDataModule, FireflyError, PreferenceDataModule
from firefly_lightning.preference.pairs import chosen_rows, collate_pairs
from tests.conftest import write_rows
from tests.support.pair_runs import labelled_pairs


def made(folder, files, **options) -> PreferenceDataModule:
    files = files if isinstance(files, list) else str(files)
    data = PreferenceDataModule(str(folder), files, **{"batch_size": 8, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def test_rows_are_prompt_and_answer_and_only_the_answer_is_learned(model_folder, pairs_file):
    data, expected = made(model_folder, pairs_file), labelled_pairs(model_folder, pairs_file)
    pairs = data.train.rows
    assert len(pairs) == len(expected) == 36
    for number, both in enumerate(expected):
        for row, (ids, labels) in zip(pairs.pair(number), both, strict=True):
            assert row.input_ids.tolist() == ids
            assert row.target_mask.tolist() == [label != -100 for label in labels]
        assert pairs.lengths[number] == sum(len(ids) for ids, _ in both)
        assert pairs.describe(number).startswith(f"{pairs_file}:{number + 1} (")
    assert pairs.kinds == ["SentimentAnalyze", "Summary"]
    assert pairs.kind_ids.tolist() == [number % 2 for number in range(36)]


def test_steps_count_pairs(model_folder, pairs_file):
    data = made(model_folder, pairs_file, micro_batch_size=2)
    assert data.train.plan.steps_per_epoch == 5
    taken = [data.train[index] for index in range(len(data.train))]
    assert [len(batch["rows"]) for batch in taken[:16]] == [2] * 16
    assert sum(len(batch["rows"]) for batch in taken[16:]) == 4
    assert [batch["step_rows"] for batch in taken] == [8] * 16 + [4] * 4
    assert sorted(int(row) for batch in taken for row in batch["rows"]) == list(range(36))
    assert len(taken[0]["input_ids"]) == 4, "two rows a pair"


def test_a_batch_holds_both_rows_and_the_tokens_of_pairs_that_share_their_beginning(model_folder, pairs_file):
    data = made(model_folder, pairs_file)
    batch, expected = data.train[0], labelled_pairs(model_folder, pairs_file)
    ids, begin = batch["shared_ids"], 0
    width = batch["input_ids"].shape[1]
    for at, number in enumerate(batch["rows"].tolist()):
        (chosen, _), (rejected, _) = expected[number]
        shared, first, second = batch["spans"][at]
        assert chosen[:shared] == rejected[:shared]
        assert chosen[shared] != rejected[shared], "no longer beginning is common"
        packed = ids[begin : begin + shared + first + second].tolist()
        assert packed == [*chosen, *rejected[shared:]]
        for side, row in enumerate((chosen, rejected)):
            places = batch["shared_sources"].view(-1, width)[2 * at + side, : len(row)]
            assert ids[places].tolist() == row
        begin += shared + first + second
    assert begin == len(ids)
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["shared_positions"]], ids)
    assert torch.equal(ids[batch["shared_targets"]], flat[batch["target_positions"]])
    assert torch.equal(flat[batch["target_positions"] + 1], batch["target_ids"])


def test_no_pairs_give_padding_that_teaches_nothing():
    batch = collate_pairs([], 3)
    assert batch["input_ids"].tolist() == [[3], [3]]
    assert batch["spans"] == [[1, 0, 0]]
    assert len(batch["target_ids"]) == len(batch["shared_targets"]) == 0


def test_the_chosen_rows_alone(model_folder, pairs_file):
    batch = made(model_folder, pairs_file).train[0]
    alone = chosen_rows(batch)
    flat = alone["input_ids"].flatten()
    assert torch.equal(alone["input_ids"], batch["input_ids"][0::2])
    assert torch.equal(flat[alone["target_positions"] + 1], alone["target_ids"])
    rows = set((alone["target_positions"] // alone["input_ids"].shape[1]).tolist())
    assert rows == set(range(len(batch["rows"])))


LONG = {"input": "问" * 30, "chosen": "好" * 40, "rejected": "坏" * 40}
SHORT = {"input": "问", "chosen": "好", "rejected": "坏"}
CUT_AWAY = {"input": "问" * 200, "chosen": "好", "rejected": "坏"}


def counts(folder, tmp_path, **options) -> tuple[dict[str, int], PreferenceDataModule]:
    file = write_rows(tmp_path / "pairs.jsonl", [SHORT, LONG, CUT_AWAY])
    data = made(folder, file, batch_size=1, **options)
    return data.train.rows.counts[0]["Preference"], data


def length_of(folder, pair: dict) -> int:
    """Tokens of the longer row of a pair, by Hugging Face's tokenizer."""
    from firefly_lightning.huggingface import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    return max(len(tokenizer(pair["input"] + pair[name]).input_ids) for name in ("chosen", "rejected")) + 4


def test_a_pair_of_which_an_answer_is_cut_away_is_left_out_and_counted(tiny_folder, tmp_path):
    most = length_of(tiny_folder, LONG) - 20
    assert length_of(tiny_folder, CUT_AWAY) > most + 20
    found, data = counts(tiny_folder, tmp_path, max_length=most)
    assert (found["rows"], found["truncated"], found["no_target"], found["dropped"]) == (3, 2, 1, 0)
    assert len(data.train.rows) == 2
    assert all(len(row.input_ids) <= most for number in range(2) for row in data.train.rows.pair(number))


def test_a_pair_that_is_too_long_is_dropped_as_a_whole(tiny_folder, tmp_path):
    uneven = {"input": "问", "chosen": "好", "rejected": "坏" * 100}
    file = write_rows(tmp_path / "pairs.jsonl", [uneven, SHORT])
    data = made(tiny_folder, file, batch_size=1, max_length=64, too_long="drop")
    found = data.train.rows.counts[0]["Preference"]
    assert (found["rows"], found["dropped"], found["truncated"], found["no_target"]) == (2, 1, 0, 0)
    assert len(data.train.rows) == 1
    assert data.train.rows.describe(0) == f"{file}:2 (Preference)"


def test_rows_cut_at_their_beginning_share_what_they_really_have_in_common(tiny_folder, tmp_path):
    uneven = {"input": "春江花月夜" * 8, "chosen": "好", "rejected": "坏" * 12}
    file = write_rows(tmp_path / "pairs.jsonl", [uneven, SHORT])
    data = made(tiny_folder, file, batch_size=2, max_length=48, too_long="truncate_keep_end")
    batch = data.train[0]
    for at, number in enumerate(batch["rows"].tolist()):
        chosen, rejected = data.train.rows.pair(number)
        shared, first, second = batch["spans"][at]
        least = min(len(chosen.input_ids), len(rejected.input_ids))
        same = chosen.input_ids[:least] == rejected.input_ids[:least]
        assert shared == (int(np.argmin(same)) if not same.all() else least)
        assert (shared + first, shared + second) == (len(chosen.input_ids), len(rejected.input_ids))
        if number == 0:
            assert shared == 1, "cut to other lengths, they share the start token only"


def test_no_pair_is_left_tells_so(tiny_folder, tmp_path):
    file = write_rows(tmp_path / "pairs.jsonl", [CUT_AWAY])
    with pytest.raises(FireflyError, match="no row has a target within 32 tokens"):
        made(tiny_folder, file, max_length=32)


def test_fractions_and_weights_count_pairs(model_folder, pairs_file):
    data = made(model_folder, [{"path": str(pairs_file), "weight": 0.5}], val_fraction=0.25)
    assert data.val.plan.rows_per_epoch == 9
    assert data.train.plan.rows_per_epoch == round(27 / 2)
    assert data.val.rows is data.train.rows


def test_pairs_that_two_files_have_are_taken_once(model_folder, pairs_file, tmp_path):
    pairs = [json.loads(line) for line in pairs_file.read_text("utf-8").splitlines()[:4]]
    turned = pairs[0] | {"chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}
    again = write_rows(tmp_path / "again.jsonl", [*pairs[1:], turned])
    data = PreferenceDataModule(str(model_folder), [str(pairs_file), str(again)], batch_size=8)
    data.prepare_data()
    data.setup("fit")
    assert data.train.plan.rows_per_epoch == 37, "the one that says the opposite is another pair"


def test_the_module_of_targets_does_not_take_pairs(model_folder, pairs_file, tmp_path):
    import lightning as L

    from firefly_lightning import FireflyModule, PreferenceModule
    from tests.support.small_runs import settings

    trainer = L.Trainer(max_steps=1, default_root_dir=tmp_path, **settings())
    with pytest.raises(FireflyError, match="would learn rejected answers too"):
        trainer.fit(FireflyModule(str(model_folder)), PreferenceDataModule(str(model_folder), str(pairs_file)))
    rows = write_rows(tmp_path / "rows.jsonl", [{"kind": "a", "input": "b", "target": "c"}] * 9)
    trainer = L.Trainer(max_steps=1, default_root_dir=tmp_path, **settings())
    with pytest.raises(FireflyError, match="preferences are learned of pairs"):
        trainer.fit(PreferenceModule(str(model_folder)), FireflyDataModule(str(model_folder), str(rows)))
