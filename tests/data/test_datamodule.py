"""From files to micro-batches: shares, validation, weights, workers, and what is refused."""

import math
import multiprocessing
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from firefly_lightning import FireflyDataModule, FireflyError, PromptFormat, Source
from firefly_lightning.data.batches import EpochSampler, collate
from firefly_lightning.data.tokenized_rows import TokenizedRow
from tests.conftest import write_rows
from tests.support.helpers import fit, forked, run, wait_for_ends
from tests.support.predicting import DECODING


def make_data(
    model_folder, rows_file, tmp_path, stage="fit", world_size=1, rank=0, step=0, **kwargs
) -> FireflyDataModule:
    data = FireflyDataModule(str(model_folder), str(rows_file), cache_dir=str(tmp_path), **kwargs)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world_size, "rank": rank}),
        accumulate_grad_batches=1,
        val_check_interval=1.0,
        global_step=step,
    )
    data.prepare_data()
    data.setup(stage)
    return data


def rows_by_step(loader) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for batch in loader:
        steps.setdefault(batch["step"], []).extend(batch["rows"].tolist())
    return {step: sorted(rows) for step, rows in steps.items()}


def test_steps_are_the_same_on_any_number_of_ranks(model_folder, rows_file, tmp_path):
    alone = rows_by_step(make_data(model_folder, rows_file, tmp_path, batch_size=8).train_dataloader())
    assert sorted(row for rows in alone.values() for row in rows) == list(range(60))
    for world_size, micro_batch_size in [(1, 2), (2, None), (2, 1), (4, 2), (3, None), (3, 2), (1, 3), (9, None)]:
        shared: dict[int, list[int]] = {step: [] for step in alone}
        for rank in range(world_size):
            data = make_data(
                model_folder, rows_file, tmp_path, batch_size=8, micro_batch_size=micro_batch_size,
                world_size=world_size, rank=rank,
            )  # fmt: skip
            for step, rows in rows_by_step(data.train_dataloader()).items():
                shared[step] += rows
            share = math.ceil(8 / world_size)
            assert data.trainer.accumulate_grad_batches == math.ceil(share / (micro_batch_size or share))
        assert {step: sorted(rows) for step, rows in shared.items()} == alone


def test_batches_tell_the_share_of_their_step(model_folder, rows_file, tmp_path):
    data = make_data(model_folder, rows_file, tmp_path, batch_size=8, micro_batch_size=2)
    steps: dict[int, list] = {}
    for batch in data.train_dataloader():
        steps.setdefault(batch["step"], []).append(batch)
    assert len(steps) == 8
    for batches in steps.values():
        assert len(batches) == 4
        assert {batch["step_micro_batches"] for batch in batches} == {4}
        assert {batch["step_target_tokens"] for batch in batches} == {sum(len(b["target_ids"]) for b in batches)}


def test_workers_give_the_same_batches(model_folder, rows_file, tmp_path):
    plain, workers = (make_data(model_folder, rows_file, tmp_path, batch_size=8, num_workers=n) for n in (0, 2))
    for one, other in zip(plain.train_dataloader(), workers.train_dataloader(), strict=True):
        assert one["step"] == other["step"]
        assert torch.equal(one["input_ids"], other["input_ids"])


def load_and_wait(output, *args):
    loader = make_data(*args, batch_size=8, num_workers=2).train_dataloader()
    assert next(iter(loader))["step"] == 0
    output.with_suffix(".part").write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
    output.with_suffix(".part").rename(output)
    time.sleep(600)


def test_workers_end_with_a_killed_process(model_folder, rows_file, tmp_path):
    output = tmp_path / "workers"
    process = forked(load_and_wait, output, model_folder, rows_file, tmp_path)
    while not output.exists():
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    workers = list(map(int, output.read_text().split()))
    assert len(workers) == 2
    wait_for_ends(workers)


def test_a_loader_starts_at_the_step_of_the_trainer(model_folder, rows_file, tmp_path):
    whole = make_data(model_folder, rows_file, tmp_path, batch_size=8).train_dataloader()
    expected = rows_by_step(whole)
    resumed = make_data(model_folder, rows_file, tmp_path, batch_size=8, step=5).train_dataloader()
    assert rows_by_step(resumed) == {step: rows for step, rows in expected.items() if step >= 5}
    assert len(resumed) == len(whole) == 8, "the epoch keeps its length, of which Lightning has counted five"
    second_epoch = make_data(model_folder, rows_file, tmp_path, batch_size=8, step=11).train_dataloader()
    assert list(rows_by_step(second_epoch)) == [11, 12, 13, 14, 15]
    assert isinstance(resumed.sampler, EpochSampler)


def test_validation_holds_rows_out(model_folder, rows_file, tmp_path):
    data = make_data(model_folder, rows_file, tmp_path, batch_size=8, val_fraction=0.25)
    train = {row for rows in rows_by_step(data.train_dataloader()).values() for row in rows}
    held_out = Counter(row for rows in rows_by_step(data.val_dataloader()).values() for row in rows)
    assert len(held_out) == 15
    assert set(held_out.values()) == {1}
    assert train == set(range(60)) - set(held_out)


def test_validation_is_shared_by_ranks_without_repeating_a_row(model_folder, rows_file, tmp_path):
    seen = Counter()
    lengths = set()
    for rank in range(2):
        data = make_data(model_folder, rows_file, tmp_path, batch_size=8, val_fraction=0.55, world_size=2, rank=rank)
        loader = data.val_dataloader()
        lengths.add(len(loader))
        seen.update(row for batch in loader for row in batch["rows"].tolist())
    assert len(seen) == 33
    assert set(seen.values()) == {1}
    assert len(lengths) == 1, "ranks take part in the same number of steps"


def test_weighted_sources(model_folder, rows_file, tmp_path):
    second = write_rows(
        tmp_path / "b.jsonl", [{"instruction": f"说{i}", "input": "", "output": "好"} for i in range(8)]
    )
    data = FireflyDataModule(
        str(model_folder),
        [str(rows_file), Source(path=str(second), weight=0.5)],
        batch_size=16,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup("fit")
    taken = [row for rows in rows_by_step(data.train_dataloader()).values() for row in rows]
    assert len([row for row in taken if row < 60]) == 60
    assert len([row for row in taken if row >= 60]) == 4


def test_test_files_are_tested(model_folder, rows_file, tmp_path):
    second = write_rows(tmp_path / "t.jsonl", [{"instruction": "说", "input": "", "output": "好"}] * 3)
    data = make_data(model_folder, rows_file, tmp_path, stage="test", test_files=str(second))
    assert sum(len(batch["rows"]) for batch in data.test_dataloader()) == 3


def test_nothing_to_test_on(model_folder, rows_file, tmp_path):
    with pytest.raises(FireflyError, match=r"data\.test_files: nothing to test on"):
        make_data(model_folder, rows_file, tmp_path, stage="test").test_dataloader()


def test_collate_pads_right_and_finds_targets():
    rows = [
        TokenizedRow(np.array([1, 7, 2, 2, 8, 2], np.int32), np.array([0, 0, 0, 0, 1, 1], bool)),
        TokenizedRow(np.array([1, 5, 2], np.int32), np.array([0, 0, 1], bool)),
    ]
    batch = collate(rows, pad_id=3)
    assert batch["input_ids"].tolist() == [[1, 7, 2, 2, 8, 2], [1, 5, 2, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["target_positions"].tolist() == [3, 4, 7]
    assert batch["target_ids"].tolist() == [8, 2, 2]


def test_collate_of_no_rows():
    batch = collate([], pad_id=3)
    assert batch["input_ids"].tolist() == [[3]]
    assert batch["attention_mask"].tolist() == [[1]]
    assert batch["target_ids"].numel() == batch["target_positions"].numel() == 0


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"micro_batch_size": -1}, "data.micro_batch_size is -1"),
        ({"max_length": 0}, "data.max_length is 0"),
        ({"val_fraction": 1.0}, "data.val_fraction is 1.0"),
        ({"val_fraction": 0.1, "val_files": "x.jsonl"}, "both set"),
        ({"prompt": "fierfly"}, "no format is called 'fierfly'"),
        ({"train_files": [Source(path="x.jsonl", weight=0.0)]}, "weight of x.jsonl is 0.0"),
        ({"train_files": [Source(path="x.jsonl", cap=0)]}, "cap of x.jsonl is 0"),
        ({"kinds": {"NER": {"epochs": -1.0}}}, "data.kinds: the epochs of NER is -1.0"),
    ],
)
def test_arguments_out_of_range(kwargs, says):
    with pytest.raises(FireflyError, match=says):
        FireflyDataModule("folder", **{"train_files": "x.jsonl", **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"micro_batch_tokens": 20}, "data.micro_batch_tokens 20 is less than the .* tokens of the longest row"),
        ({"val_fraction": 0.001}, "leaves one side empty"),
        ({"max_length": 2}, "no row has a target within 2 tokens"),
    ],
)
def test_what_setup_refuses(model_folder, rows_file, tmp_path, kwargs, says):
    with pytest.raises(FireflyError, match=says):
        make_data(model_folder, rows_file, tmp_path, **kwargs)


def test_own_control_strings(model_folder, rows_file, tmp_path):
    data = make_data(model_folder, rows_file, tmp_path, prompt=PromptFormat(separator="</s>"))
    assert data.train.rows[0].input_ids.tolist().count(2) == 3 + 1 - 1 + 1  # input, two targets, one later input


@pytest.mark.parametrize(("interval", "expected"), [(5, 20), (0.5, 16), (0.01, 4), (1.0, 1.0)])
def test_validation_comes_between_steps(model_folder, rows_file, tmp_path, interval, expected):
    data = make_data(model_folder, rows_file, tmp_path, batch_size=8, micro_batch_size=2)  # 8 steps of 4 micro-batches
    data.trainer = SimpleNamespace(**{**vars(data.trainer), "val_check_interval": interval})
    for _ in range(2):  # a trainer may be used for more than one fit
        data.setup("fit")
        assert data.trainer.val_check_interval == expected


def test_contradicting_accumulation(model_folder, rows_file, tmp_path):
    data = make_data(model_folder, rows_file, tmp_path, batch_size=8, micro_batch_size=2)
    data.trainer.accumulate_grad_batches = 3
    with pytest.raises(FireflyError, match=r"trainer\.accumulate_grad_batches 3 disagrees"):
        data.setup("fit")


def test_text_that_is_not_read_is_named_before_training_and_in_the_report(model_folder, tmp_path):
    messages = [{"role": "user", "content": "在吗", "name": "小明"}, {"role": "assistant", "content": "在"}]
    rows = [{"instruction": "问", "output": "答", "note": "一个说明", "kind": "[/x]"}, {"messages": messages}] * 2
    file = write_rows(tmp_path / "rows.jsonl", rows)
    few = [
        "--trainer.max_steps",
        1,
        "--data.batch_size",
        2,
        "--data.val_files",
        file,
        "--trainer.val_check_interval",
        1,
    ]
    result = fit(
        model_folder, file, tmp_path, *few, "--trainer.enable_progress_bar", "true", "--samples.prompts", '["[/x]"]'
    )
    assert "[bold]" not in result.stdout, "what Lightning itself prints keeps its markup"
    report = (tmp_path / "lightning_logs" / "version_0" / "report.md").read_text("utf-8")
    line = f"{file}: nothing is learned of the text in these fields, here with their rows: messages.name (2), note (2)"
    assert line in report
    assert r"| \[/x\] | 2 |" in report
    common = ["--model.path", model_folder, "--data.val_files", file, "--trainer.default_root_dir", tmp_path]
    for stage in ("validate", "test"):
        result = run("firefly-fit", stage, *common, "--trainer.accelerator", "cpu", *DECODING, "--data.batch_size", 4)
        assert "[/x]" in result.stdout


def test_only_last_targets_count_in_a_step(model_folder, tmp_path):
    rows = [{"kind": "K", "input": "一", "target": "春风</s>二</s>明月"}] * 4
    file = write_rows(tmp_path / "rows.jsonl", rows)
    counts = {}
    for learn in ("all", "last"):
        data = make_data(model_folder, file, tmp_path, batch_size=4, learn=learn)
        (batch,) = data.train_dataloader()
        counts[learn] = batch["step_target_tokens"]
        assert len(batch["target_ids"]) == counts[learn]
    assert 0 < counts["last"] < counts["all"]
    untaught = write_rows(
        tmp_path / "none.jsonl", [{"conversation": [{"human": "问", "assistant": "答", "weight": 0}]}]
    )
    with pytest.raises(FireflyError, match=r"none\.jsonl: no row has a target that is learned; see data\.learn"):
        make_data(model_folder, untaught, tmp_path)


@pytest.mark.parametrize("key", ["val_files", "test_files"])
def test_a_mistyped_name_is_told_before_rows_are_read(key, tiny_folder, rows_file, tmp_path):
    data = FireflyDataModule(
        str(tiny_folder), str(rows_file), cache_dir=str(tmp_path / "cache"), **{key: str(tmp_path / "typo.jsonl")}
    )
    with pytest.raises(FireflyError, match=r"typo\.jsonl: no such file"):
        data.prepare_data()
    assert not (tmp_path / "cache").exists()
