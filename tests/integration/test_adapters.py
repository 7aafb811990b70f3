"""Adapters from training to use: trained, resumed, exported, and read by stock peft and transformers."""

import json
import re
import shutil
from contextlib import nullcontext

import lightning as L
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from firefly_lightning import FireflyModule
from firefly_lightning.callbacks.model_size import ModelSize
from firefly_lightning.checkpoints.layout import TRAINER_FILE
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import load_bloom
from firefly_lightning.interrupts import Terminated
from firefly_lightning.model.adapters import Lora
from tests.support.choice import DIVIDED
from tests.support.helpers import logits, one_line, raised_line, run
from tests.support.small_runs import Interrupting, make_data, settings, train

STEPS, STOP = 8, 4

VARIANTS = {
    "lora": {"adapter": "lora"},
    "dropout": {"adapter": Lora(rank=4, alpha=8, dropout=0.2, target_modules=["query_key_value"])},
    "nf4": {"adapter": "lora", "quantize": "nf4"},
    "int8": {"adapter": "lora", "quantize": "int8"},
    "neftune": {"adapter": "lora", "neftune_noise_alpha": 5.0},
    "eager": {"adapter": "lora", "attention": "eager"},
    "recomputing": {"adapter": "lora", "gradient_checkpointing": True},
}

QUANTISES = not transformers.__version__.startswith("4.")
"""Whether this transformers has quantised weights on CPUs."""

PRECISIONS = {"32-true": VARIANTS, "bf16-mixed": ["lora", "nf4"], "bf16-true": ["lora"]}
CASES = [(name, precision) for precision, names in PRECISIONS.items() for name in names]
if DIVIDED:
    CASES = [("dropout", "32-true"), ("nf4", "32-true"), ("lora", "bf16-mixed")]


def refused_to_quantise(name: str):
    """What a run on quantised weights must end with where transformers cannot have them on CPUs; else nothing."""
    if QUANTISES or "quantize" not in VARIANTS[name]:
        return nullcontext()
    told = f"model.quantize {VARIANTS[name]['quantize']}: transformers {transformers.__version__} cannot do it on this "
    return pytest.raises(FireflyError, match=f"^{re.escape(told)}device; take 5 or later$")


def module(folder, **options) -> FireflyModule:
    return FireflyModule(str(folder), learning_rate=1e-2, warmup_steps=2, **options)


@pytest.fixture(scope="module")
def adapted(tiny_folder, short_rows, tmp_path_factory):
    """A checkpoint of a LoRA."""
    root = tmp_path_factory.mktemp("adapted")
    train(tiny_folder, short_rows, root, module=module(tiny_folder, adapter="lora"), max_steps=3)
    return root / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tiny_folder, short_rows, tmp_path_factory):
    """A checkpoint of a training of all weights."""
    root = tmp_path_factory.mktemp("whole")
    train(tiny_folder, short_rows, root, max_steps=3)
    return root / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_an_interrupted_run_goes_on_to_the_digit(name, precision, tiny_folder, short_rows, tmp_path):
    parts, options = (tiny_folder, short_rows), {"max_steps": STEPS, "precision": precision}
    with refused_to_quantise(name) as refused:
        complete = train(*parts, tmp_path / "complete", module=module(tiny_folder, **VARIANTS[name]), **options)
    if refused:
        return
    assert complete.losses[STEPS - 1] < complete.losses[0]
    root, stop = tmp_path / "stopped", [Interrupting(STOP)]
    with pytest.raises(Terminated):
        train(*parts, root, stop, module=module(tiny_folder, **VARIANTS[name]), **options)
    last = root / "checkpoints" / "last.ckpt"
    resumed = train(*parts, root, ckpt_path=last, module=module(tiny_folder, **VARIANTS[name]), **options)
    assert resumed.losses == {step: loss for step, loss in complete.losses.items() if step > STOP}


@pytest.mark.skipif(not QUANTISES, reason="transformers 4 quantises on GPUs only; see the test above")
def test_validations_do_not_change_a_training_on_quantised_weights(tiny_folder, short_rows, short_val_rows, tmp_path):
    losses = []
    for name, more in (("without", {}), ("with", {"val_check_interval": 2, "check_val_every_n_epoch": None})):
        data = {"val_files": str(short_val_rows)} if more else {}
        own = module(tiny_folder, **VARIANTS["nf4"])
        noted = train(tiny_folder, short_rows, tmp_path / name, module=own, max_steps=5, data=data, **more)
        losses.append(noted.losses)
        assert bool(noted.validated) == bool(more)
    assert losses[0] == losses[1]


def test_a_checkpoint_holds_what_is_trained_alone(adapted, tiny_folder):
    names = []
    for file in adapted.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    assert names
    assert all("lora_" in name for name in names), "no weight of the base"
    record = torch.load(adapted / TRAINER_FILE, weights_only=True)["adapter"]
    assert record["config"]["r"] == 8
    assert record["base"]["path"] == str(tiny_folder.resolve())


def test_stock_peft_and_transformers_read_what_is_exported(adapted, tiny_folder, short_rows, tmp_path):
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    run("firefly", "export", "--checkpoint", adapted, "--out", merged)
    run("firefly", "export", "--checkpoint", adapted, "--out", alone, "--adapter")
    expected = trained_logits(adapted, tiny_folder, short_rows)
    assert (logits(load_bloom(str(tiny_folder), torch.float32)) - expected).abs().max() > 1e-3, "something was learned"
    stock = AutoModelForCausalLM.from_pretrained(merged).float().eval()
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder).float(), alone).eval()
    ours = load_bloom(str(alone), torch.float32).eval()
    for model in (stock, beside, ours):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    again = tmp_path / "again"
    run("firefly", "export", "--checkpoint", alone, "--out", again)
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert json.loads((again / "prompt_format.json").read_text()) == json.loads(
        (merged / "prompt_format.json").read_text()
    )


def test_an_adapters_folder_can_be_trained_in_full_and_damage_in_it_is_told(adapted, short_rows, tmp_path):
    alone = tmp_path / "alone"
    run("firefly", "export", "--checkpoint", adapted, "--out", alone, "--adapter")
    noted = train(alone, short_rows, tmp_path / "run", module=module(alone), max_steps=3)
    assert noted.losses[2] < noted.losses[0]
    file = alone / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    for damaged, told in (
        (
            {key: value for key, value in tensors.items() if key != name},
            f"lacks {name.removeprefix('base_model.model.')}",
        ),
        (tensors | {"base_model.model.foo.weight": torch.ones(2)}, "has foo.weight, unlike adapter_config.json"),
        (tensors | {name: tensors[name].int()}, f"{name} has whole numbers, no weights"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, f"{name} has numbers that are not finite"),
    ):
        save_file(damaged, file, metadata={"format": "pt"})
        line = one_line(run("firefly", "export", "--checkpoint", alone, "--out", tmp_path / "merged", check=False))
        assert line.startswith(f"{file}: {told}")
        assert not (tmp_path / "merged").exists()
    file.write_bytes(file.read_bytes()[:500])
    line = one_line(run("firefly", "export", "--checkpoint", alone, "--out", tmp_path / "merged", check=False))
    assert line.startswith(f"{file}: is no complete safetensors file")


def trained_logits(checkpoint, folder, rows) -> torch.Tensor:
    """Logits of the model with its adapter as a run has it in memory after loading a checkpoint."""
    kept = module(folder, adapter="lora")
    trainer = L.Trainer(**settings(), limit_test_batches=1)
    trainer.test(kept, datamodule=make_data(folder, rows, test_files=str(rows)), ckpt_path=checkpoint, verbose=False)
    return logits(kept.model.eval())


def test_an_adapter_answers_like_the_merged_model(adapted, short_rows, tmp_path):
    answers = []
    for name, flags in (("merged", []), ("alone", ["--adapter"])):
        out = tmp_path / name
        run("firefly", "export", "--checkpoint", adapted, "--out", out, *flags)
        chat = run("firefly", "chat", "--model", out, "--prompt", "说", "--greedy", "--max_new_tokens", 8)
        files = ["--data.predict_files", short_rows, "--model.path", out, "--trainer.default_root_dir", tmp_path / name]
        decoding = ["--model.decoding.do_sample", "false", "--model.decoding.min_new_tokens", 4]
        run("firefly-fit", "predict", *files, "--trainer.accelerator", "cpu", *decoding)
        (found,) = (tmp_path / name).rglob("predictions.jsonl")
        answers.append((chat.stdout, found.read_text("utf-8")))
    assert answers[0] == answers[1]
    predictions = [json.loads(line)["generated"] for line in answers[0][1].splitlines()]
    assert len(predictions) == 38
    assert any(predictions)


def test_a_resumed_run_has_the_same_base_and_adapter(adapted, whole, tiny_folder, short_rows, tmp_path):
    refused = {
        "model.adapter: differs from the checkpoint's (r 8 → 4)": ({"adapter": Lora(rank=4)}, adapted),
        "the checkpoint is of an adapter, the run trains all weights": ({}, adapted),
        "model.adapter: the checkpoint is of a training of all weights": ({"adapter": "lora"}, whole),
    }
    for message, (options, checkpoint) in refused.items():
        with pytest.raises(FireflyError) as raised:
            train(
                tiny_folder,
                short_rows,
                tmp_path,
                ckpt_path=checkpoint,
                module=module(tiny_folder, **options),
                max_steps=5,
            )
        assert raised_line(raised).startswith(message)
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    changed = load_bloom(str(tiny_folder), torch.float32)
    changed.transformer.ln_f.bias.data += 1
    changed.save_pretrained(other)
    with pytest.raises(FireflyError) as raised:
        train(other, short_rows, tmp_path, ckpt_path=adapted, module=module(other, adapter="lora"), max_steps=5)
    assert raised_line(raised).startswith(f"model.path {other}: has other weights than the checkpoint's base")
    told = one_line(
        run("firefly", "export", "--checkpoint", adapted, "--out", tmp_path / "x", "--base", other, check=False)
    )
    assert told == f"{other}: has other weights than the adapter was trained on; name that model with --base"
    assert not (tmp_path / "x").exists()


def test_a_refused_resume_is_told_before_weights_are_loaded_and_leaves_nothing(
    adapted, tiny_folder, short_rows, tmp_path
):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    files = ["--model.path", tmp_path, "--data.train_files", short_rows, "--trainer.accelerator", "cpu"]
    more = ["--ckpt_path", adapted, "--trainer.default_root_dir", tmp_path / "a" / "run", "--trainer.max_steps", 5]
    for adapter, message in {
        (): "the checkpoint is of an adapter, the run trains all weights",
        ("--model.adapter", "lora"): f"model.path {tmp_path}: has other weights than the checkpoint's base",
        (
            "--model.adapter",
            "lora",
            "--model.adapter.rank",
            4,
        ): "model.adapter: differs from the checkpoint's (r 8 → 4)",
    }.items():
        assert one_line(run("firefly-fit", "fit", *files, *more, *adapter, check=False)).startswith(message)
    assert not (tmp_path / "a").exists()


def test_a_moved_base_is_named_where_an_adapters_folder_is_merged(adapted, tiny_folder, tmp_path):
    moved, folder = tmp_path / "基座", tmp_path / "adapter"
    run("firefly", "export", "--checkpoint", adapted, "--out", folder, "--adapter")
    run("firefly", "export", "--checkpoint", folder, "--out", tmp_path / "before")
    shutil.copytree(tiny_folder, moved)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    text = json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")})
    (folder / "adapter_config.json").write_text(text, "utf-8")
    line = one_line(
        run("firefly", "export", "--checkpoint", folder, "--out", moved / "in", "--base", moved, check=False)
    )
    assert line == f"{moved / 'in'}: lies in {moved}, which is an input; write to another place"
    run("firefly", "export", "--checkpoint", folder, "--out", tmp_path / "after", "--base", moved)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (folder / "adapter_config.json").read_text("utf-8") == text


def test_weights_of_four_bits_are_counted_as_many_as_they_are(tiny_folder, short_rows, tmp_path, caplog):
    with caplog.at_level("INFO"), refused_to_quantise("nf4"):
        logged = settings(enable_model_summary=True, callbacks=[ModelSize()])
        trainer = L.Trainer(**logged, max_steps=1, default_root_dir=tmp_path)
        trainer.fit(module(tiny_folder, **VARIANTS["nf4"]), datamodule=make_data(tiny_folder, short_rows))
    if QUANTISES:
        bloom = load_bloom(str(tiny_folder), torch.float32)
        whole = sum(parameter.numel() for parameter in bloom.parameters())
        rank, width = 8, bloom.config.hidden_size
        lora = bloom.config.n_layer * rank * width * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
        assert f"model: {whole + lora:,} parameters, {lora:,} of them trained" in caplog.text


def test_exports_that_cannot_be_made(adapted, whole, tmp_path):
    def refused(*args):
        line = one_line(run("firefly", "export", *args, "--out", tmp_path / "x", check=False))
        assert not (tmp_path / "x").exists()
        return line

    message = f"{whole}: is of a training of all weights; leave --adapter and --base out"
    assert refused("--checkpoint", whole, "--adapter") == message
    assert refused("--checkpoint", adapted, "--base", tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder")
