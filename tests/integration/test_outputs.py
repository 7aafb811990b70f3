"""No command writes over what it reads, however the output is spelt, and none leaves what a killed one has left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import check_output, new_file, new_folder
from tests.conftest import write_rows
from tests.support.helpers import ROOT, fit, one_line, run

TEMPLATE = """
kind: Weather
description: 根据天气给出建议
fields: {weather: 天气, advice: 建议}
groups: [{inputs: ["今天{weather}，出门要注意什么？"], targets: ["{advice}"]}]
example: {row: {weather: 下雨, advice: 带伞。}, input: 今天下雨，出门要注意什么？, target: 带伞。}
"""
RAW = [{"weather": "下雪", "advice": "慢些走。"}]
SPELLINGS = ("same", "relative", "dotted", "link", "hard link")


@pytest.fixture
def inputs(tmp_path, model_folder, rows_file) -> dict[str, Path]:
    """Everything that a command may read, each in a file or folder of its own that can be spoilt."""
    here = {
        "rows": Path(shutil.copy(rows_file, tmp_path / "rows.jsonl")),
        "val": write_rows(tmp_path / "val.jsonl", [{"kind": "NLI", "input": "甲", "target": "乙丙丁"}]),
        "raw": write_rows(tmp_path / "raw.jsonl", RAW),
        "template": tmp_path / "templates" / "Weather.yaml",
        "keep": Path(shutil.copy(rows_file, tmp_path / "keep.jsonl")),
        "config": tmp_path / "run.yaml",
        "model": Path(shutil.copytree(model_folder, tmp_path / "model")),
    }
    here["template"].parent.mkdir()
    here["template"].write_text(TEMPLATE, "utf-8")
    here["config"].write_text(f"model: {{path: {here['model']}}}\ndata: {{train_files: {here['rows']}}}\n", "utf-8")
    return here


COMMANDS = {
    # Flags that read, then flags that write a file or a folder.
    "build": (
        ["build", "--kind", "Weather", "--source", "{raw}", "--templates", "{templates}", "--workers", "1"],
        {"--out": ("raw", "template")},
    ),
    "clean": (
        ["clean", "--files", "{rows}", "--val_files", "{val}"],
        {"--out": ("rows", "val"), "--report": ("rows", "val")},
    ),
    "stats": (["stats", "--files", "{rows}", "--tokenizer", "{model}"], {"--out": ("rows", "model")}),
    "prune": (
        ["prune", "--model", "{model}", "--corpus", "{rows}", "--keep", "{keep}", "--verify", "{val}"],
        {"--out": ("model", "rows", "keep", "val")},
    ),
    "plan": (["plan", "--config", "{config}", "--strategies", "auto"], {"--out": ("config", "model", "rows")}),
}
WRITES = [
    (name, flag, read) for name, (_, flags) in COMMANDS.items() for flag, inputs in flags.items() for read in inputs
]


def spelt(path: Path, spelling: str, folder: Path) -> str:
    """Another name of what is at a path; of a folder, of a place in it."""
    inside = "inside" if path.is_dir() else ""
    if spelling == "relative":
        return os.path.relpath(path / inside, ROOT)
    if spelling == "dotted":
        return str(path.parent / "nowhere" / ".." / path.name / inside)
    if spelling in ("link", "hard link"):
        other = folder / f"other{path.suffix}"
        other.hardlink_to(path) if spelling == "hard link" and path.is_file() else other.symlink_to(path)
        return str(other / inside)
    return str(path / inside)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("name", "flag", "read"), WRITES)
def test_no_output_takes_the_place_of_an_input(name, flag, read, spelling, inputs, tmp_path):
    before = contents(tmp_path)
    (tmp_path / "nowhere").mkdir()
    words = {key: str(path) for key, path in inputs.items()} | {"templates": str(inputs["template"].parent)}
    command = [word.format(**words) for word in COMMANDS[name][0]]
    out = [] if flag == "--out" else ["--out", tmp_path / "out"]
    result = run("firefly", *command, *out, flag, spelt(inputs[read], spelling, tmp_path), check=False)
    assert one_line(result)
    (tmp_path / "nowhere").rmdir()
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) <= {"other", f"other{inputs[read].suffix}"}, "nothing else is there"


def test_a_report_is_not_the_cleaned_file(inputs, tmp_path):
    for report in ("out.jsonl", "./nowhere/../out.jsonl"):
        command = ["clean", "--files", inputs["rows"], "--out", "out.jsonl", "--report", report]
        assert "is also --out" in one_line(run("firefly", *command, check=False, cwd=tmp_path))
        assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("place", ["", "inside"])
def test_a_checkpoint_is_not_exported_into_itself(place, model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, "--data.micro_batch_size", 4, "--trainer.max_steps", 1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = contents(last)
    assert one_line(run("firefly", "export", "--checkpoint", last, "--out", last / place, check=False))
    assert contents(last) == before


@pytest.mark.parametrize("command", ["predict", "test"])
def test_answers_do_not_replace_the_rows_they_answer(command, model_folder, rows_file, tmp_path):
    rows = write_rows(
        tmp_path / "predictions.jsonl", [json.loads(line) for line in rows_file.open(encoding="utf-8")][:2]
    )
    before = contents(tmp_path)
    common = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.default_root_dir", tmp_path]
    given = ["--model.path", model_folder, f"--data.{command}_files", rows]
    result = run("firefly-fit", command, *common, *given, check=False)
    assert "predictions.jsonl: is also an input" in one_line(result)
    assert {path: held for path, held in contents(tmp_path).items() if path in before} == before


def test_a_configuration_that_was_given_stays_as_it_is(model_folder, rows_file, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"# mine\ndata: {{train_files: {rows_file}}}\n", "utf-8")
    before = config.read_text("utf-8")
    command = [
        "fit",
        "--config",
        config,
        "--model.path",
        model_folder,
        "--trainer.max_steps",
        1,
        "--trainer.logger",
        "false",
    ]
    run("firefly-fit", *command, "--trainer.default_root_dir", tmp_path, "--trainer.accelerator", "cpu",
        "--trainer.enable_checkpointing", "false", "--samples.prompts", "[]")  # fmt: skip
    assert config.read_text("utf-8") == before


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_output_is_found_among_inputs_by_whatever_path(tmp_path_factory, data):
    """A path with dots and links in it is refused just where, written to, it would change an input."""
    top = tmp_path_factory.mktemp("tree")
    for folder in ("a/b", "c"):
        (top / folder).mkdir(parents=True)
    (top / "a/b/file").write_text("1", "ascii")
    (top / "c/to_b").symlink_to(top / "a/b")
    (top / "c/hard").hardlink_to(top / "a/b/file")
    (top / "a/soft").symlink_to(top / "a/b/file")
    steps = data.draw(
        st.lists(st.sampled_from(["..", ".", "a", "b", "c", "to_b", "file", "hard", "soft", "new"]), max_size=6)
    )
    given_input = data.draw(st.sampled_from(["a", "a/b", "a/b/file", "c/hard", "c/to_b", "c/none"]))
    out = top.joinpath(*steps)
    real, source = Path(os.path.realpath(out)), top / given_input
    if not real.is_relative_to(top):
        return
    hits = source.exists() and any(
        place.exists() and os.path.samestat(place.stat(), source.stat()) for place in (real, *real.parents)
    )
    if hits:
        with pytest.raises(FireflyError):
            check_output(out, [source])
    elif not any("to_b" in step or step in ("hard", "soft") for step in steps):
        check_output(out, [source])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and every folder, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "lightning_logs" not in path.parts
    }


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    script = (
        "import os, signal; from pathlib import Path; from firefly_lightning.files.atomic import new_file, new_folder\n"
        "with new_file(Path('out'), []) as file, new_folder(Path('made'), []) as folder:\n"
        "    file.write(b'x'); (folder / 'part').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = run_python(script, tmp_path)
    assert result.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2, "both were begun"
    with new_file(tmp_path / "out", []) as file, new_folder(tmp_path / "made", []) as folder:
        assert set(tmp_path.iterdir()) == {Path(file.name), folder}, "only what this process fills is there"
        with new_file(tmp_path / "out", []) as other:  # a living one's is left alone
            assert {Path(file.name), Path(other.name)} <= set(tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]


def run_python(script: str, folder: Path):
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
