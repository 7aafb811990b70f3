"""The reference is computed once, kept in cache and checkpoint, and never that of weights that were trained since."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import BloomForCausalLM

from firefly_lightning.checkpoints.layout import REFERENCE_KEY
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.model.adapters import as_config, put, without_adapter
from firefly_lightning.preference import reference
from tests.support.helpers import fit, logged, one_line, run
from tests.support.pair_runs import PREFERENCE, labelled_pairs, reference_of

ARGS = [*PREFERENCE, "--data.batch_size", 8, "--model.learning_rate", 1e-2, "--model.warmup_steps", 0,
        "--trainer.max_steps", 4, "--checkpoint.every_n_steps", 2,
        "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 1e-2,
        "--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor", 1]  # fmt: skip


def saved_reference(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(trainer_file(checkpoint), "cpu")[REFERENCE_KEY]


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Names of the sources whose log-probabilities are computed."""
    names, made = [], reference.computed_by

    def noting(trainer, evaluate):
        compute = made(trainer, evaluate)
        return lambda batches, numbers, name: names.append(Path(name).name) or compute(batches, numbers, name)

    monkeypatch.setattr("firefly_lightning.preference.module.computed_by", noting)
    return names


@pytest.fixture(scope="module")
def plain(model_folder, pairs_file) -> np.ndarray:
    model = BloomForCausalLM.from_pretrained(model_folder).double().eval()
    return np.array(reference_of(model, labelled_pairs(model_folder, pairs_file)))


def test_it_is_that_of_stock_bloom_and_is_in_the_checkpoint(model_folder, pairs_file, plain, tmp_path):
    fit(model_folder, pairs_file, tmp_path, *ARGS)
    (found,) = saved_reference(tmp_path / "checkpoints" / "last.ckpt").values()
    assert np.allclose(found.numpy(), plain, rtol=1e-5, atol=1e-4)


def test_a_second_run_takes_it_from_the_cache(model_folder, pairs_file, val_pairs_file, tmp_path, computed):
    own = [*ARGS, "--data.cache_dir", tmp_path / "cache", "--data.val_files", val_pairs_file]
    fit(model_folder, pairs_file, tmp_path / "one", *own)
    assert computed == ["pairs.jsonl", "val.jsonl"]
    fit(model_folder, pairs_file, tmp_path / "two", *own)
    assert computed == ["pairs.jsonl", "val.jsonl"]
    assert logged(tmp_path / "one") == logged(tmp_path / "two")


def test_other_weights_rows_and_precisions_are_computed_anew(model_folder, pairs_file, tmp_path, computed):
    cache = ["--data.cache_dir", tmp_path / "cache"]
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    model = BloomForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.transformer.ln_f.bias += 0.1
    model.save_pretrained(other)
    set_otherwise = tmp_path / "set otherwise"  # the same weights
    shutil.copytree(model_folder, set_otherwise)
    config = json.loads((set_otherwise / "config.json").read_text("utf-8"))
    (set_otherwise / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}), "utf-8")
    ways = [(model_folder, []), (other, []), (set_otherwise, []), (model_folder, ["--data.max_length", 40]),
            (model_folder, ["--trainer.precision", "bf16-mixed"]), (model_folder, ["--model.attention", "eager"]),
            (model_folder, ["--data.prompt", "firefly_single"])]  # fmt: skip
    for at, (folder, own) in enumerate(ways):
        fit(folder, pairs_file, tmp_path / str(at), *ARGS, *cache, *own)
        assert len(computed) == at + 1, own
        assert math.isclose(float(logged(tmp_path / str(at))[0]), math.log(2), rel_tol=1e-3)


def test_a_damaged_file_is_made_anew(model_folder, pairs_file, tmp_path, computed):
    own = [*ARGS, "--data.cache_dir", tmp_path / "cache"]
    fit(model_folder, pairs_file, tmp_path / "one", *own)
    reports = [path for path in (tmp_path / "cache").rglob("report.json") if "reference_log_probs" in path.read_text()]
    (file,) = [path.parent / "rows.arrow" for path in reports]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = fit(model_folder, pairs_file, tmp_path / "two", *own)
    assert len(computed) == 2
    assert "it is made anew" in result.stderr
    assert logged(tmp_path / "one") == logged(tmp_path / "two")


def without_cache(root: Path) -> list[object]:
    return ["--data.cache_dir", root / "cache"]


def test_a_resumed_run_takes_it_from_the_checkpoint(model_folder, pairs_file, val_pairs_file, tmp_path, computed):
    val = ["--data.val_files", val_pairs_file, "--trainer.val_check_interval", 2]
    fit(model_folder, pairs_file, tmp_path / "whole", *ARGS, *val)
    first = [*ARGS, *val, *without_cache(tmp_path / "a")]
    fit(model_folder, pairs_file, tmp_path / "run", *first, "--trainer.max_steps", 2)
    computed.clear()
    gone = [*ARGS, *val, *without_cache(tmp_path / "b"), "--ckpt_path", "last"]
    fit(model_folder, pairs_file, tmp_path / "run", *gone)
    assert computed == []
    whole = logged(tmp_path / "whole")
    assert logged(tmp_path / "run") == whole
    assert logged(tmp_path / "run", "val_loss")[3] == logged(tmp_path / "whole", "val_loss")[3]


def test_other_pairs_are_no_reason_to_measure_trained_weights(
    model_folder, pairs_file, val_pairs_file, tmp_path, computed
):
    first = [*ARGS, *without_cache(tmp_path / "a"), "--trainer.max_steps", 2]
    fit(model_folder, pairs_file, tmp_path / "run", *first)
    go_on = [*ARGS, *without_cache(tmp_path / "b"), "--ckpt_path", "last"]
    computed.clear()
    line = one_line(fit(model_folder, val_pairs_file, tmp_path / "run", *go_on, check=False))
    assert "reference log-probabilities are of other pairs" in line
    with_val = [*go_on, "--data.val_files", val_pairs_file]
    line = one_line(fit(model_folder, pairs_file, tmp_path / "run", *with_val, check=False))
    assert "no reference log-probabilities of these pairs are known" in line
    assert "are not the reference any more" in line
    assert computed == []
    # As the line says: once the model of before has been validated with them, the cache has them.
    validated = ["--model.path", model_folder, "--data.val_files", val_pairs_file, "--trainer.accelerator", "cpu"]
    root = ["--trainer.default_root_dir", tmp_path / "before"]
    run("firefly-fit", "validate", *PREFERENCE, *validated, *root, *without_cache(tmp_path / "b"))
    fit(model_folder, pairs_file, tmp_path / "run", *with_val)
    assert computed == ["val.jsonl"]


def test_a_training_of_targets_is_not_resumed_nor_one_of_pairs_on_targets(
    model_folder, rows_file, pairs_file, tmp_path
):
    common = ["--data.batch_size", 8, "--model.warmup_steps", 0]
    fit(model_folder, rows_file, tmp_path, *common, "--trainer.max_steps", 2)
    fit(model_folder, pairs_file, tmp_path / "pairs", *ARGS)
    on_targets = [*common, "--trainer.max_steps", 8, "--ckpt_path", "last"]
    line = one_line(fit(model_folder, rows_file, tmp_path / "pairs", *on_targets, check=False))
    assert "was saved by a training of preferences" in line
    assert "firefly export" in line
    line = one_line(fit(model_folder, pairs_file, tmp_path, *ARGS, "--ckpt_path", "last", check=False))
    assert "was saved by a training that has no reference" in line
    assert "firefly export" in line


ADAPTERS = {
    "lora": {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "init_lora_weights": False}},
    "ia3": {"class_path": "peft.IA3Config", "init_args": {"target_modules": ["query_key_value", "dense_4h_to_h"],
                                                            "feedforward_modules": ["dense_4h_to_h"]}},
    "norms": {"class_path": "peft.LNTuningConfig", "init_args": {"target_modules": ["input_layernorm"]}},
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_base_is_the_reference(name, model_folder, pairs_file, plain, tmp_path):
    """Also of an adapter that changes the model from the first step on."""
    config = json.loads(json.dumps(ADAPTERS[name]))
    config["init_args"].setdefault("target_modules", ["query_key_value"])
    fit(model_folder, pairs_file, tmp_path, *ARGS, "--model.adapter", json.dumps(config))
    (found,) = saved_reference(tmp_path / "checkpoints" / "last.ckpt").values()
    assert np.allclose(found.numpy(), plain, rtol=1e-5, atol=1e-4)
    first = float(logged(tmp_path)[0])
    assert math.isclose(first, math.log(2), rel_tol=1e-6) == (name != "lora")


def test_without_its_adapter_a_model_is_its_base_and_nothing_else_changes(model_folder):
    bloom = BloomForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.arange(4, 24)[None]
    expected = bloom(ids).logits
    put(bloom, as_config(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["query_key_value"])))
    trained = {name for name, one in bloom.named_parameters() if one.requires_grad}
    with_adapter = bloom(ids).logits
    with without_adapter(bloom):
        assert torch.equal(bloom(ids).logits, expected)
        assert {name for name, one in bloom.named_parameters() if one.requires_grad} == trained
    assert torch.equal(bloom(ids).logits, with_adapter)
    assert not torch.allclose(with_adapter, expected)


def test_a_resumed_adapter_can_measure_other_validation_pairs(
    model_folder, pairs_file, val_pairs_file, tmp_path, computed
):
    own = [*ARGS, "--model.adapter", "lora"]
    fit(model_folder, pairs_file, tmp_path, *own, *without_cache(tmp_path / "a"), "--trainer.max_steps", 2)
    computed.clear()
    more = ["--data.val_files", val_pairs_file, "--trainer.val_check_interval", 2, "--ckpt_path", "last"]
    fit(model_folder, pairs_file, tmp_path, *own, *without_cache(tmp_path / "b"), *more)
    assert computed == ["val.jsonl"]
