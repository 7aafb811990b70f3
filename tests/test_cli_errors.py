"""Likely mistakes on the command line and in YAML, and the one line that answers each of them."""

import importlib
import os
from pathlib import Path

import pytest
import yaml

from firefly_lightning.cli_errors import Refusals, check_numbers, nearest, refusals_of
from firefly_lightning.errors import FireflyError, check_number
from tests.support.helpers import fit, one_line, run
from tests.support.ranks import lean

IN_YAML = {
    "": "holds no keys; a configuration is lines such as KEY: VALUE",
    "- a\n- b\n": "holds no keys",
    "hello\n": "holds no keys",
    "data:\n\tbatch_size: 8\n": ":2: not YAML, found character '\\t' that cannot start any token at column 1",
    "data: {batch_size: 8\ntrainer: {max_steps: 1}\n": ":2: not YAML, expected ',' or '}'",
    "data:\n  train_files: a: b\n": ":2: not YAML, mapping values are not allowed here at column 17",
    "data:\n  batch_size: 8\n   max_length: 7\n": ":3: not YAML, mapping values are not allowed here",
    "data:\n  train_files: 'a\n": ":3: not YAML, found unexpected end of stream",
    "model: *none\n": ":1: not YAML, found undefined alias 'none'",
    "dta:\n  train_files: a\n": "dta.train_files: no such key; did you mean data.train_files?",
    "trianer: {max_steps: 3}\n": "did you mean trainer.max_steps?",
    "modle: {path: x}\n": "did you mean model.path?",
    "batch_size: 3\n": "batch_size: no such key; did you mean data.batch_size?",
    "best_ckpt: {monitor: x}\n": "did you mean best_checkpoint.monitor?",
    "fit: {model: {path: x}}\n": "did you mean model.path?",
    "data: {train_files: 3}\n": "data.train_files: 3 is not str or list",
    "data: rows.jsonl\n": "data: No module named 'rows'; write keys, such as data.train_files",
    "data: [rows.jsonl]\n": "data: ['rows.jsonl'] is no part of a configuration; write keys, such as data.train_files",
    "model: bloom-zh\n": "model: no class is called bloom-zh; write keys, such as model.path",
    "trainer: gpu\n": "trainer: gpu is no part of a configuration; write keys, such as trainer.max_steps",
    "data: {kinds: {NER: 3}}\n": "data.kinds: 3 is not dict",
    "data: {kinds: {NER: {wieght: 3}}}\n": "did you mean data.kinds.weight?",
    "data: {train_files: [{path: a, weight: two}]}\n": "data.train_files: two is not",
    "model: {decoding: {max_tokens: 3}}\n": "did you mean model.decoding.max_new_tokens?",
    "model: {decoding: {do_sample: maybe}}\n": "model.decoding: maybe is not bool",
    "model: {optimizer: AdamWW}\n": "model.optimizer: no class is called AdamWW; did you mean AdamW?",
    "model: {optimizer: {class_path: torch.optim.AdamWW}}\n": "has no attribute 'AdamWW'; did you mean AdamW?",
    "model: {lr_scheduler: CosineAnealingLR}\n": "did you mean CosineAnnealingLR?",
    "data: {prompt: {bos: x}}\n": "data.prompt.bos: no such key; there are end, later_separator, separator, start",
    "trainer: {logger: {class_path: CometLogger, init_args: {entity: me}}}\n": "CometLogger needs comet_ml, which is",
    "data:\n  batch_size：8\n  max_length: 7\n": "line 2 has a full-width colon (：), write : and a blank",
    "data: {train_files: [{path: a, weight: 1.0e+300}]}\n": "the weight of a is 1e+300; it must be above 0 and at most",
    "data: {train_files: [{path: a, weight: .inf}]}\n": "the weight of a is inf; it must be finite and above 0",
    "data: {train_files: [{path: a, weight: .nan}]}\n": "the weight of a is nan; it must be finite and above 0",
    "model: {learning_rate: .nan}\n": "model.learning_rate is nan; it must be finite and at least 0",
    "throughput: {peak_tflops: 0}\n": "throughput.peak_tflops is 0.0; it must be above 0",
}

FLAGS = {
    "--config trian.yaml": "trian.yaml: no such file; check the path",
    "--config .": "is a folder; name a file in it",
    "train.yaml": "train.yaml: belongs to no flag; did you mean --config train.yaml?",
    "--learning_rate 1e-4": "learning_rate: no such key; did you mean model.learning_rate?",
    "--model.learning-rate 1e-4": "did you mean model.learning_rate?",
    "--model.learningrate 1e-4": "did you mean model.learning_rate?",
    "--lr 1e-4": "did you mean model.learning_rate?",
    "--max_steps 3": "did you mean trainer.max_steps?",
    "--max-steps 3": "did you mean trainer.max_steps?",
    "--trainer.max_step 3": "did you mean trainer.max_steps?",
    "--devices 2": "did you mean trainer.devices?",
    "--strategy ddp": "did you mean trainer.strategy?",
    "--epochs 2": "did you mean trainer.max_epochs?",
    "--trainer.gpus 2": "did you mean trainer.devices?",
    "--trainer.learning_rate 2": "did you mean model.learning_rate?",
    "--data.learning_rate 2": "data.learning_rate: no such key; did you mean model.learning_rate?",
    "--model.batch_size 2": "did you mean data.batch_size?",
    "--data PreferenceDataModule --data.learn all": "data.learn: PreferenceDataModule has no such key; leave it out",
    "--data.path 2": "did you mean model.path?",
    "--resume_from_checkpoint last": "did you mean ckpt_path?",
    "--output_dir out": "did you mean trainer.default_root_dir?",
    "--confg a.yaml": "did you mean config?",
    "--trainer.max_steps": "--trainer.max_steps: expected one argument",
    "--trainer.strategy zero_3": "trainer.strategy zero_3: no such strategy; did you mean zero3?",
    "--trainer.strategy dpp": "did you mean ddp?",
    "--trainer.strategy ZeRO2": "did you mean zero2?",
    "--trainer.precision bf16_mixed": "trainer.precision: bf16_mixed is not",
    "--trainer.accelerator gup": "`accelerator='gup'`",
    "--trainer.accelerator cpu --trainer.devices -1": "`devices` selected with `CPUAccelerator` should be an int > 0",
    "--trainer.max_steps 1e3": "trainer.max_steps: 1000.0 is not int",
    "--model.learning_rate 0,001": "model.learning_rate: 0,001 is not float",
    "--model.learning_rate=-1": "model.learning_rate is -1.0; it must be at least 0",
    "--model.warmup_steps -1": "model.warmup_steps is -1; it must be at least 0",
    "--model.from_scratch maybe": "model.from_scratch: maybe is not bool",
    "--model.attention flash": "model.attention: flash is not one of 'auto', 'sdpa', 'eager'",
    "--data.val_fraction 5": "data.val_fraction is 5.0; it must be at least 0 and below 1",
    "--data.val_fraction 0.5 --data.val_files a": "data.val_fraction and data.val_files are both set",
    "--data.prompt chatml": "data.prompt: no format is called 'chatml'; there are firefly,",
    "--data.num_workers -1": "data.num_workers is -1; it must be at least 0 and at most 1,024",
    "--data.batch_size 1000000000 --data.micro_batch_size 1": "data.batch_size is 1000000000; it must be at least 1",
    "--data.max_length 1099511627776": "data.max_length is 1099511627776; it must be",
    "--data.batch_size 1.5": "data.batch_size: 1.5 is not int",
    "--data.row_format my_rows.messages": "data.row_format: No module named 'my_rows'; name a class or function",
    "--samples.prompts 你好": "samples.prompts: 你好 is not a list",
    "--checkpoint.keep 0": "checkpoint.keep is 0; it must be at least 1",
    "--checkpoint.every_n_steps -1": "checkpoint.every_n_steps is -1; it must be at least 1",
    "--best_checkpoint.save_top_k -2": "best_checkpoint.save_top_k is -2; it must be at least -1",
    "--best_checkpoint.mode lowest": "BestCheckpoint: `mode` can be min, max but got lowest",
    "--seed_everything -1": "seed_everything is -1; it must be at least 0 and at most 4,294,967,295",
    "--seed_everything 4294967296": "seed_everything is 4294967296",
    "--trainer.val_check_interval 0": "trainer.val_check_interval is 0; it must be above 0",
    "--trainer.check_val_every_n_epoch 0": "trainer.check_val_every_n_epoch is 0; it must be at least 1",
    "--ckpt_path=": "--ckpt_path: the value is empty; give one, or leave the flag out",
    "--ckpt_path best": "there is no best-*.ckpt, as nothing was validated; name a checkpoint",
    "--trainer.callbacks EarlyStoping": "no class is called EarlyStoping; did you mean EarlyStopping?",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitr x": "did you mean trainer.callbacks.monitor?",
    "--trainer.callbacks EarlyStopping": "trainer.callbacks.monitor is required",
    "--trainer.callbacks Timer --trainer.callbacks.duration 9s": "Timer: `Timer(duration='9s')` is not",
    "--trainer.logger CometLogger": "CometLogger: ",
    "--trainer.logger WandLogger": "did you mean WandbLogger?",
    "--model my.Module": "model: No module named 'my'",
    "--data FireflyDataModul": "did you mean FireflyDataModule?",
    "--trainer.profiler simpel": "['simple', 'advanced'",
}


@pytest.mark.parametrize("text", IN_YAML)
def test_a_mistake_in_a_file_is_answered_in_one_line(text, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(text, "utf-8")
    line = one_line(answered(tmp_path, "--config", config))
    assert IN_YAML[text] in line
    assert len(line) < 300
    assert not (tmp_path / "root").exists(), "nothing was begun"


@pytest.mark.parametrize("text", FLAGS)
def test_a_mistake_in_a_flag_is_answered_in_one_line(text, tmp_path):
    line = one_line(answered(tmp_path, *text.split()))
    assert FLAGS[text] in line
    assert len(line) < 300
    assert not (tmp_path / "root").exists(), "nothing was begun"


def answered(folder: Path, *args: object):
    with lean(["fit"]):
        own = ["--model.path", "x", "--trainer.default_root_dir", folder / "root"]
        return run("firefly-fit", "fit", *own, *args, check=False)


def test_a_module_of_the_working_folder_says_how_it_is_found(tmp_path):
    (tmp_path / "my_own_rows.py").write_text("def dialog(fields): return None\n", "utf-8")
    with lean(["fit"]):
        named = ["--data.row_format", "my_own_rows.dialog"]
        result = run("firefly-fit", "fit", "--model.path", "x", *named, check=False, cwd=tmp_path)
    assert "it is in this folder: put PYTHONPATH=. before the command" in one_line(result)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_a_file_that_is_not_utf8_is_named(encoding, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_bytes("model:\n  path: 模型\n".encode(encoding))
    assert one_line(answered(tmp_path, "--config", config)).startswith(f"{config}: byte 0x")


def test_every_error_of_a_file_begins_with_its_name(tmp_path):
    for number, text in enumerate(("data: {batch_size: many}\n", "trainer: {callbacks: Nothing}\n")):
        config = tmp_path / f"{number}.yaml"
        config.write_text(text, "utf-8")
        assert one_line(answered(tmp_path, "--config", config)).startswith(f"{config}: ")


INTERPOLATED = """
model:
  path: &path ${oc.env:FIREFLY_NONE,模型}/bloom  # not ${oc.env:FIREFLY_NONE}
data:
  train_files:
    - ${oc.env:FIREFLY_ROWS}
    - "${oc.env:FIREFLY_BATCH}"
  batch_size: ${oc.env:FIREFLY_BATCH}
  cache_dir: *path
samples:
  prompts:
    - 这件商品 ${价格} 元
"""


def test_variables_of_the_environment_stand_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("FIREFLY_ROWS", "行 #1: a.jsonl")
    monkeypatch.setenv("FIREFLY_BATCH", "8")
    monkeypatch.delenv("FIREFLY_NONE", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text(INTERPOLATED, "utf-8")
    shown = yaml.safe_load(run("firefly-fit", "fit", "--config", config, "--print_config").stdout)
    data = shown["data"]["init_args"]
    assert shown["model"]["init_args"]["path"] == data["cache_dir"] == "模型/bloom"
    assert data["train_files"] == ["行 #1: a.jsonl", "8"]
    assert data["batch_size"] == 8
    assert shown["samples"]["prompts"] == ["这件商品 ${价格} 元"]


def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FIREFLY_NONE", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text("data:\n  train_files: ${oc.env:FIREFLY_NONE}\n", "utf-8")
    line = one_line(answered(tmp_path, "--config", config))
    assert line.startswith(f"{config}: ${{oc.env:FIREFLY_NONE}}: FIREFLY_NONE is not set; set it, or write")


def test_plans_name_a_missing_file_too(tmp_path):
    line = one_line(run("firefly", "plan", "--config", tmp_path / "trian.yaml", check=False))
    assert line == f"--config {tmp_path / 'trian.yaml'}: no such file; check the path"


@pytest.mark.parametrize("command", ["build", "clean", "stats", "prune", "plan", "export", "chat"])
def test_empty_values_are_refused_by_every_command(command, tmp_path):
    for flag in (["--out", ""], ["--out="]):
        line = one_line(run("firefly", command, *flag, check=False, cwd=tmp_path))
        assert line == "--out: the value is empty; give one, or leave the flag out"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "stats --files {rows} --tokenizer x --micro_batch_size -1",
            "data.micro_batch_size is -1; it must be at least 1",
        ),
        (
            "stats --files {rows} --tokenizer x --micro_batch_size 0",
            "data.micro_batch_size is 0; it must be at least 1",
        ),
        ("prune --model x --corpus {rows} --pad_multiple 1099511627776", "--pad_multiple is 1099511627776; it must be"),
    ],
)
def test_numbers_of_other_commands_have_their_ranges(command, says, rows_file, tmp_path):
    words = command.format(rows=rows_file).split()
    assert says in one_line(run("firefly", *words, "--out", tmp_path / "out", check=False))
    assert not list(tmp_path.iterdir())


def test_a_timer_runs_with_its_default_interval(model_folder, rows_file, tmp_path):
    timer = ["--trainer.callbacks", "Timer", "--trainer.callbacks.duration", "00:01:00:00"]
    fit(model_folder, rows_file, tmp_path, "--trainer.max_steps", 1, "--model.warmup_steps", 1, *timer)
    assert "interval: step" in (tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text("utf-8")


def test_a_start_that_fails_leaves_no_folder(model_folder, rows_file, tmp_path):
    wrong = ["--data.micro_batch_tokens", 5]
    one_line(fit(model_folder, rows_file, tmp_path, *wrong, check=False))
    assert not list(tmp_path.rglob("version_*"))
    fit(model_folder, rows_file, tmp_path, "--trainer.max_steps", 1, "--model.warmup_steps", 1)
    one_line(fit(model_folder, rows_file, tmp_path, *wrong, check=False))
    assert [path.name for path in tmp_path.rglob("version_*")] == ["version_0"], "that of the run is still there"


def test_a_run_that_fails_later_keeps_its_folder(model_folder, rows_file, tmp_path):
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_los"]
    short = ["--trainer.max_steps", 2, "--data.val_fraction", 0.1, "--trainer.val_check_interval", 1]
    one_line(fit(model_folder, rows_file, tmp_path, *short, *stopping, check=False))
    assert (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").is_file()


def test_numbers_are_checked_against_their_bounds():
    for value in (0, 3, 2.5, None):
        check_number("x", value, least=0, most=3)
    for value in (-1, 4, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(FireflyError, match=r"^x is "):
            check_number("x", value, least=0, most=3)
    with pytest.raises(FireflyError, match="x is 0; it must be above 0"):
        check_number("x", 0, above=0)
    check_numbers({"trainer.max_steps": True, "trainer.val_check_interval": "00:01:00:00"})


def test_the_same_word_elsewhere_comes_before_a_like_one():
    known = {"model.path", "data.seed", "data.batch_size", "trainer.max_epochs", "trainer.min_epochs"}
    assert nearest("path", known) == ["model.path"]
    assert nearest("trainer.mx_epochs", known) == ["trainer.max_epochs"]
    assert nearest("trainer.mn_epochs", known) == ["trainer.min_epochs"]
    assert nearest("trainer.m_epochs", known) == ["trainer.max_epochs", "trainer.min_epochs"]
    assert nearest("quite_another", known) == []


def test_what_a_constructor_refuses_is_noted_and_a_fault_stays_one():
    def refused(kind, *args, **kwargs):
        raise kind("no\n  good")

    def faulty(kind, *args, **kwargs):
        raise KeyError("a fault")

    refusals = Refusals()
    with pytest.raises(FireflyError, match="ValueError: no good"):
        refusals.noting(refused)(ValueError, applied_instantiation_links={})
    assert str(refusals.noted) == "ValueError: no good"
    with pytest.raises(KeyError):
        refusals.noting(faulty)(int, applied_instantiation_links={})
    assert isinstance(refusals.noted, KeyError)


def test_only_what_the_package_itself_raises_becomes_a_line(tmp_path, monkeypatch):
    (tmp_path / "inside_package.py").write_text("def fail(kind): raise kind('says why')\n", "ascii")
    monkeypatch.syspath_prepend(tmp_path)
    inside = importlib.import_module("inside_package")
    with pytest.raises(FireflyError, match="says why"), refusals_of(tmp_path):
        inside.fail(RuntimeError)
    with pytest.raises(KeyError), refusals_of(tmp_path):
        inside.fail(KeyError)
    with pytest.raises(ValueError, match="elsewhere"), refusals_of(tmp_path):
        raise ValueError("elsewhere")
    assert os.fspath(tmp_path) in inside.__file__
