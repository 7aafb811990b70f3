"""Weights, caps and epochs of sources and kinds, and rows that two sources share."""

from collections import Counter

import pytest

from firefly_lightning import FireflyDataModule, FireflyError
from firefly_lightning.data import mixing
from tests.conftest import write_rows
from tests.support.helpers import one_line, run


def of_kind(kind, count, start=0):
    return [{"kind": kind, "input": f"第{at}问", "target": f"{kind}{at}"} for at in range(start, start + count)]


@pytest.fixture
def files(tmp_path):
    first = of_kind("NER", 40) + of_kind("Cot", 20)
    second = of_kind("NER", 10, 100) + of_kind("Belle", 30)
    return [str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", first), ("b", second))]


def taken(data, epochs=1):
    """Rows that epochs take, by file and kind."""
    plan = data.train.plan
    rows = [row for step in range(epochs * plan.steps_per_epoch) for row in plan.rows(step)]
    places = (data.train.rows.describe(int(row)) for row in rows)
    return Counter((place.split("/")[-1].split(":")[0], place.split("(")[1][:-1]) for place in places)


def make(model_folder, tmp_path, train_files, **kwargs):
    data = FireflyDataModule(str(model_folder), train_files, batch_size=10, cache_dir=str(tmp_path / "cache"), **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


ALL = {("a.jsonl", "NER"): 40, ("a.jsonl", "Cot"): 20, ("b.jsonl", "NER"): 10, ("b.jsonl", "Belle"): 30}


@pytest.mark.parametrize(
    ("first", "second", "kinds", "changes"),
    [
        ({}, {}, {}, {}),
        ({}, {}, {"Cot": {"weight": 2.0}}, {("a.jsonl", "Cot"): 40}),
        ({"weight": 0.5}, {}, {"NER": {"weight": 2.0}}, {("a.jsonl", "Cot"): 10, ("b.jsonl", "NER"): 20}),
        ({}, {}, {"NER": {"cap": 25}}, {("a.jsonl", "NER"): 20, ("b.jsonl", "NER"): 5}),
        ({}, {}, {"NER": {"cap": 1000}}, {}),
        ({}, {"cap": 20}, {"NER": {}}, {("b.jsonl", "NER"): 5, ("b.jsonl", "Belle"): 15}),
        ({}, {}, {"Belle": {"epochs": 0.5}}, {("b.jsonl", "Belle"): 15}),
    ],
)
def test_an_epoch_takes_what_was_asked_for(model_folder, tmp_path, files, first, second, kinds, changes):
    sources = [{"path": files[0], **first}, {"path": files[1], **second}]
    data = make(model_folder, tmp_path, sources, kinds=kinds)
    assert taken(data) == {**ALL, **changes}


def test_a_cap_of_a_source_without_kinds_holds_over_all_it_has(model_folder, tmp_path, files):
    data = make(model_folder, tmp_path, [files[0], {"path": files[1], "cap": 20}])
    assert sum(count for (name, _), count in taken(data).items() if name == "b.jsonl") == 20


def test_what_is_used_up_is_replaced_by_the_others(model_folder, tmp_path, files):
    data = make(model_folder, tmp_path, [files[0], {"path": files[1], "epochs": 1}])
    of_two, of_three = taken(data, 2), taken(data, 3)
    assert sum(of_two.values()) == 200
    assert {key: of_three[key] for key in ALL if key[0] == "b.jsonl"} == {
        ("b.jsonl", "NER"): 10,
        ("b.jsonl", "Belle"): 30,
    }
    assert sum(count for (name, _), count in of_three.items() if name == "a.jsonl") == 300 - 40


def test_rows_of_two_files_are_taken_once_and_reported(model_folder, tmp_path, files, monkeypatch):
    said = []
    monkeypatch.setattr(mixing, "rank_zero_info", said.append)
    belle = [{"instruction": row["input"], "input": "", "output": row["target"]} for row in of_kind("Belle", 30)]
    belle[3] = {"instruction": "第", "input": "3问", "output": " Belle3\n"}  # joined by a line end here
    new = [{"instruction": "新", "input": "", "output": f"新{at}"} for at in range(5)]
    third = str(write_rows(tmp_path / "belle.jsonl", belle + new + new[:1]))
    data = make(model_folder, tmp_path, [*files, third])
    assert taken(data) == {**ALL, ("belle.jsonl", "Belle"): 6}
    (line,) = [line for line in said if "files before it" in line]
    assert line.startswith(f"{third}: 30 of 36 rows (30 Belle) are in the files before it too")
    held_out = make(model_folder, tmp_path, [*files, third], val_fraction=0.5)
    assert sum(taken(held_out).values()) == 53
    assert not {*map(int, held_out.train.plan.rows(0))} & {*map(int, held_out.val.plan.rows(0))}


def test_a_kind_that_is_not_there_is_named(model_folder, tmp_path, files):
    with pytest.raises(FireflyError, match=r"data\.kinds: no row is of the kind Ner; there are Belle, Cot, NER"):
        make(model_folder, tmp_path, files, kinds={"Ner": {"weight": 1.0}})


def test_kinds_are_keys_of_the_configuration(model_folder, tmp_path, files):
    config = tmp_path / "mix.yaml"
    config.write_text(
        f"data:\n  train_files: [{files[0]}, {{path: {files[1]}, cap: 20, epochs: 3}}]\n"
        "  kinds:\n    NER: {weight: 0.5, cap: 9}\n    Belle: {epochs: 1}\n", "utf-8"
    )  # fmt: skip
    arguments = ["--config", config, "--model.path", model_folder, "--trainer.accelerator", "cpu"]
    common = [*arguments, "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path / "run"]
    assert run("firefly-fit", "fit", *common, "--trainer.max_steps", "2").returncode == 0
    config.write_text(config.read_text("utf-8").replace("cap: 9", "cup: 9"), "utf-8")
    assert "data.kinds.cup: no such key; did you mean data.kinds.cap?" in one_line(
        run("firefly-fit", "fit", *common, check=False)
    )


def test_a_run_longer_than_its_rows_is_refused_before_it_begins(model_folder, tmp_path, files):
    sources = f"[{{path: {files[0]}, epochs: 1}}, {{path: {files[1]}, epochs: 2}}]"
    arguments = ["--model.path", model_folder, "--data.train_files", sources, "--trainer.accelerator", "cpu"]
    common = [*arguments, "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path / "run"]
    said = one_line(run("firefly-fit", "fit", *common, "--trainer.max_epochs", "3", check=False))
    assert "every source has been taken as often as its epochs allow after 1 epochs" in said
