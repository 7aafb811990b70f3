"""firefly-fit and firefly as a user types them: what they make, and one clear line for every mistake."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from firefly_lightning.callbacks.run_figures import draw_losses, read_metrics
from firefly_lightning.cli_errors import explain
from tests.conftest import write_rows
from tests.support.helpers import ROOT, fit, logged, one_line, run

SHORT = ["--trainer.max_steps", 3, "--model.warmup_steps", 1, "--data.batch_size", 8]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder, rows_file):
    root = tmp_path_factory.mktemp("trained")
    args = [*SHORT, "--data.val_fraction", 0.1, "--trainer.val_check_interval", 3]
    fit(model_folder, rows_file, root, *args, figures=True)
    return root


def test_a_run_leaves_figures_curve_configuration_and_checkpoints(trained):
    version = trained / "lightning_logs" / "version_0"
    assert sorted(logged(trained)) == [0, 1, 2]
    for name in ("lr", "grad_norm", "target_tokens_per_second", "data_wait"):
        assert len(logged(trained, name)) == 3, name
    assert len(logged(trained, "val_loss")) == len(logged(trained, "val_perplexity")) == 1
    assert (version / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(version.glob("events.out.tfevents.*"))
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names[1:] == ["last.ckpt"]
    assert names[0].startswith("best-step=3-val_loss=")


def test_the_saved_configuration_runs_as_it_is(trained, tmp_path):
    saved = trained / "lightning_logs" / "version_0" / "config.yaml"
    run("firefly-fit", "fit", "--config", saved, "--trainer.default_root_dir", tmp_path)
    assert logged(tmp_path) == logged(trained)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_second_run_in_the_same_folder_loses_nothing_of_the_first(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *SHORT)
    first = (tmp_path / "checkpoints" / "last.ckpt" / "checkpoint.json").read_bytes()
    fit(model_folder, rows_file, tmp_path, *SHORT, "--data.seed", 1)
    assert (tmp_path / "checkpoints" / "last.ckpt" / "checkpoint.json").read_bytes() == first
    assert (tmp_path / "checkpoints" / "last-v1.ckpt").exists()
    assert logged(tmp_path, version=1) != logged(tmp_path)


def test_the_command_line_wins_over_yaml_and_checkpoint(trained, model_folder, rows_file, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    more = ["--trainer.max_steps", 5, "--data.batch_size", 8, "--model.warmup_steps", 4, "--data.val_fraction", 0.1]
    fit(model_folder, rows_file, tmp_path / "run", *more, "--ckpt_path", "last")
    saved = yaml.safe_load((tmp_path / "run" / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["warmup_steps"] == 4
    assert sorted(logged(tmp_path / "run")) == [0, 1, 2, 3, 4]


def test_test_and_validate_use_a_checkpoint(trained, model_folder, rows_file, tmp_path):
    common = ["--model.path", model_folder, "--data.val_files", rows_file, "--trainer.accelerator", "cpu"]
    checkpoint = ["--ckpt_path", trained / "checkpoints" / "last.ckpt"]
    run("firefly-fit", "validate", *common, "--trainer.default_root_dir", tmp_path / "a")
    run("firefly-fit", "validate", *common, "--trainer.default_root_dir", tmp_path / "b", *checkpoint)
    run("firefly-fit", "test", *common, "--trainer.default_root_dir", tmp_path / "c", *checkpoint)
    before, after = (logged(tmp_path / name, "val_loss") for name in "ab")
    assert float(next(iter(after.values()))) < float(next(iter(before.values())))
    assert list(logged(tmp_path / "c", "test_loss").values()) == list(after.values())


def test_published_configurations_name_known_keys_and_repeat_no_default():
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(files) >= 3
    defaults = yaml.safe_load(run("firefly-fit", "fit", "--model.path", "x", "--print_config").stdout)
    for file in files:
        first = file.read_text("utf-8").splitlines()[0]
        assert first == f"# firefly-fit fit --config {file.relative_to(ROOT)}"
        own = yaml.safe_load(file.read_text("utf-8"))
        own = {group: fields.get("init_args", fields) for group, fields in own.items()}
        path = [] if "path" in own["model"] else ["--model.path", "x"]  # of the user's own model
        parsed = yaml.safe_load(run("firefly-fit", "fit", "--config", file, *path, "--print_config").stdout)
        for group, fields in own.items():
            for name, value in fields.items():
                where = (group, "init_args", name) if group in ("model", "data") else (group, name)
                found = look_up(parsed, where)
                if name == "optimizer":  # the parser adds the arguments that are left out
                    given = {key: found["init_args"][key] for key in value["init_args"]}
                    found = {"class_path": found["class_path"], "init_args": given}
                if name == "adapter":
                    found = {key: found[key] for key in value}
                assert found == value, where
                assert look_up(defaults, where) != value, f"{file.name}: {group}.{name} is the default"


def look_up(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


@pytest.fixture
def broken(model_folder, tmp_path):
    """A copy of the model's folder, to be broken."""
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    return folder


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def test_wrong_rows(model_folder, tmp_path):
    good = json.dumps({"kind": "A", "input": "好", "target": "是"}, ensure_ascii=False)
    cases = {
        "": "has no rows",
        f"{good}\n{{'kind'": ":2: not JSON",
        f"{good}\n" + '{"kind": "A", "input": "x"}': ":2: field 'target' is missing",
        '{"kind": "A", "input": 3, "target": "x"}': ":1: field 'input' must be a string, this is int",
        f"{good}\n{good}\n" + '{"kind": "A", "input": "x", "target": " "}': ":3: the target is empty",
        '{"question": "x", "answer": "y"}': "['answer', 'question'] are none of the accepted forms",
    }
    for number, (content, says) in enumerate(cases.items()):
        path = tmp_path / f"rows{number}.jsonl"
        path.write_text(content, "utf-8")
        message = one_line(fit(model_folder, path, tmp_path / "run", check=False))
        assert message.startswith(str(path))
        assert says in message
    path = tmp_path / "gbk.jsonl"
    path.write_bytes(good.encode() + b"\n" + good.encode("gb18030") + b"\n")
    assert f"{path}:2: byte 0xba is not UTF-8" in one_line(fit(model_folder, path, tmp_path / "run", check=False))
    missing = tmp_path / "missing.jsonl"
    assert f"{missing}: no such file" in one_line(fit(model_folder, missing, tmp_path / "run", check=False))
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.tmp*"))


def test_wrong_tokenizers(broken, rows_file, tmp_path):
    special = broken / "tokenizer_config.json"
    original = special.read_text("utf-8")
    edit_json(special, pad_token="</s>")
    assert "pad_token and eos_token are the same token" in one_line(fit(broken, rows_file, tmp_path, check=False))
    special.write_text(json.dumps({k: v for k, v in json.loads(original).items() if k != "bos_token"}), "utf-8")
    assert "the tokenizer has no bos_token" in one_line(fit(broken, rows_file, tmp_path, check=False))
    (broken / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in one_line(fit(broken, rows_file, tmp_path, check=False))


def test_a_model_and_a_tokenizer_of_different_sizes(model_folder, broken, rows_file, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=900, hidden_size=48, n_layer=2, n_head=6)).save_pretrained(broken)
    message = one_line(fit(broken, rows_file, tmp_path, check=False))
    assert "the tokenizer has 1500 tokens, the embedding only 900 rows" in message


def test_wrong_limits_and_models(trained, model_folder, rows_file, tmp_path):
    message = one_line(fit(model_folder, rows_file, tmp_path, "--data.micro_batch_tokens", 5, check=False))
    assert "data.micro_batch_tokens 5 is less than the" in message
    message = one_line(fit(tmp_path / "nowhere", rows_file, tmp_path, check=False))
    assert message.startswith(f"{tmp_path}/nowhere: no such folder")


def test_a_checkpoint_of_another_model(trained, broken, rows_file, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=1500, hidden_size=60, n_layer=2, n_head=6)).save_pretrained(broken)
    checkpoint = trained / "checkpoints" / "last.ckpt"
    message = one_line(fit(broken, rows_file, tmp_path, "--ckpt_path", checkpoint, check=False))
    assert "has hidden_size 60, but the checkpoint is of a model with 48" in message


def test_a_checkpoint_that_is_none(model_folder, rows_file, tmp_path):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(b"no checkpoint")
    assert str(path) in one_line(fit(model_folder, rows_file, tmp_path, "--ckpt_path", path, check=False))
    torch.save({"state_dict": {}}, path)
    assert str(path) in one_line(fit(model_folder, rows_file, tmp_path, "--ckpt_path", path, check=False))


def test_a_full_disk_while_saving(model_folder, rows_file, tmp_path):
    """The limit lets logs and caches through, but not half a megabyte of weights."""
    command = [*SHORT, "--model", "tests.support.helpers.OnAFullDisk", "--checkpoint.every_n_steps", 2]
    message = one_line(fit(model_folder, rows_file, tmp_path, *command, check=False, process=True))
    assert message.startswith(f"{tmp_path}/checkpoints/last.ckpt: ")
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("yaml_text", "says"),
    [
        ("data: {batch_szie: 8}", "data.batch_szie: no such key; did you mean data.batch_size?"),
        ("trainer: {max_stpes: 8}", "trainer.max_stpes: no such key; did you mean trainer.max_steps?"),
        ("model: {learning_rat: 1.0}", "model.learning_rat: no such key; did you mean model.learning_rate?"),
        ("checkpoint: {every_n_step: 1}", "did you mean checkpoint.every_n_steps?"),
        ("data: {batch_size: many}", "data.batch_size: many is not int"),
        ("data: {train_files: [{path: a, wieght: 2}]}", "did you mean data.train_files.weight?"),
        ("data: {train_files: [{weight: 2}]}", "data.train_files.path is required"),
        ("data: {too_long: shorten}", "data.too_long: shorten is not one of 'truncate', 'truncate_keep_end', 'drop'"),
        (
            "data: tests.support.helpers.Killed",
            "data: tests.support.helpers.Killed: Import path does not correspond to a subclass of",
        ),
        ("model: tests.support.helpers.Nothing", "module 'tests.support.helpers' has no attribute 'Nothing'"),
    ],
)
def test_wrong_keys_and_values(tmp_path, yaml_text, says):
    config = tmp_path / "config.yaml"
    config.write_text(yaml_text, "utf-8")
    result = run("firefly-fit", "fit", "--model.path", "x", "--config", config, check=False)
    assert says in one_line(result)


def test_nothing_to_validate_on(model_folder, rows_file, tmp_path):
    result = run("firefly-fit", "validate", "--model.path", model_folder, "--data.train_files", rows_file, check=False)
    assert one_line(result).startswith("data.val_files: nothing to validate on")


def test_nothing_to_train_on(model_folder):
    for command in (["fit"], ["validate", "--data.val_fraction", 0.5]):
        result = run("firefly-fit", *command, "--model.path", model_folder, check=False)
        assert one_line(result) == "data.train_files: nothing to train on; name at least one file"


def test_a_run_without_checkpoints(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *SHORT, "--trainer.enable_checkpointing", "false")
    assert sorted(logged(tmp_path)) == [0, 1, 2]
    assert not (tmp_path / "checkpoints").exists()


def test_a_dry_run_saves_nothing(model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, "--trainer.fast_dev_run", "true")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_is_saved_whatever_the_interval(trained, model_folder, rows_file, tmp_path):
    fit(model_folder, rows_file, tmp_path, *SHORT, "--checkpoint.every_n_steps", 2)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt" / "trainer.ckpt", weights_only=True)
    assert saved["global_step"] == 3


def test_what_lightning_refuses_is_one_line_too(model_folder, rows_file, tmp_path):
    message = one_line(fit(model_folder, rows_file, tmp_path, "--trainer.val_check_interval", 2.5, check=False))
    assert "val_check_interval" in message


def test_arguments_of_the_trainer_that_do_not_go_together(model_folder, rows_file, tmp_path):
    zero = {"class_path": "firefly_lightning.strategies.ZeroStrategy", "init_args": {"stage": 2}}
    chosen = ["--trainer.strategy", json.dumps(zero), "--trainer.precision", "64-true"]
    line = one_line(fit(model_folder, rows_file, tmp_path, *SHORT, *chosen, check=False))
    assert "64-true" in line


def test_a_path_is_required():
    assert one_line(run("firefly-fit", "fit", check=False)).startswith("model.path is required")


def test_messages_that_are_not_known_come_through_on_one_line():
    assert explain("something\n  new", set()) == "something new"


def test_firefly_lists_its_commands_and_names_wrong_flags():
    for command in ("prune", "build", "export", "chat"):
        assert command in run("firefly", "--help").stdout
    message = one_line(run("firefly", "export", "--checkpoitn", "x", "--out", "y", check=False))
    assert "did you mean checkpoint?" in message


def test_firefly_takes_several_files(rows_file, tmp_path):
    raw = write_rows(tmp_path / "raw.jsonl", [{"text": "房间很干净", "label": "positive"}])
    out = tmp_path / "out.jsonl"
    run("firefly", "build", "--kind", "SentimentAnalyze", "--source", raw, raw, "--out", out)
    assert len(out.read_text("utf-8").splitlines()) == 2


def test_losses_of_a_resumed_run_are_joined(tmp_path):
    header = "step,train_loss,val_loss\n"
    for version, lines in enumerate(
        ["0,9,\n1,8,\n2,7,\n", "0,5,\n1,4,\n1,,6\n2,3,\n3,2,\n", "2,1,\n3,0.5,\n3,,0.25\n"]
    ):
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(header + lines)
    losses = read_metrics(tmp_path / "version_2")
    assert losses == {"train_loss": {0: 5, 1: 4, 2: 1, 3: 0.5}, "val_loss": {1: 6, 3: 0.25}}
    draw_losses(losses, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000
