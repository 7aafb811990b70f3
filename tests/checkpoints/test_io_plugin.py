"""Checkpoints whole or not at all, and Hugging Face folders made of them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors import safe_open
from transformers import AutoTokenizer

from firefly_lightning.checkpoints import layout
from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
from firefly_lightning.checkpoints.paths import find_checkpoint
from firefly_lightning.errors import FireflyError
from firefly_lightning.export import export
from firefly_lightning.huggingface import (
    describe,
    load_bloom,
    load_prompt_format,
)
from firefly_lightning.prompt import PRESETS, PromptEncoder
from firefly_lightning.strategies.sharded_checkpoints import ShardedCheckpoints
from tests.conftest import tiny_bloom
from tests.support.helpers import logits, raised_line

TURNS = [("你好，世界", "春风😀"), ("hello ", "world\n"), ("", "还")]
MESSAGES = [
    {"role": role, "content": text} for turn in TURNS for role, text in zip(("user", "assistant"), turn, strict=True)
]


def save(path, bloom, tokenizer, prompt="firefly", **changes):
    state_dict = {f"model.{name}": weight for name, weight in bloom.state_dict().items()}
    description = describe(bloom.config, tokenizer, PRESETS[prompt])
    AtomicCheckpointIO().save_checkpoint({"state_dict": state_dict, "hugging_face": description, **changes}, path)
    return path


@pytest.mark.parametrize("prompt", PRESETS)
def test_exported_chat_template_gives_the_ids_of_training(bloom, tokenizer, prompt, tmp_path):
    export(str(save(tmp_path / "a.ckpt", bloom, tokenizer, prompt)), str(tmp_path / "out"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoder = PromptEncoder(tokenizer, PRESETS[prompt])
    for count in (1, 3):
        ids = exported.apply_chat_template(MESSAGES[: 2 * count], return_dict=False)
        assert ids == encoder.encode([TURNS[:count]])[0].input_ids
        ids = exported.apply_chat_template(MESSAGES[: 2 * count - 1], add_generation_prompt=True, return_dict=False)
        assert ids == encoder.encode_question(TURNS[: count - 1], TURNS[count - 1][0])
    assert load_prompt_format(str(tmp_path / "out")) == PRESETS[prompt]


ALONE = """
import json, sys, warnings

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("firefly_lightning", "lightning"):
            raise ImportError(name)

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoTokenizer, BloomForCausalLM, PreTrainedTokenizerFast

out = sys.argv[1]
model, info = BloomForCausalLM.from_pretrained(out, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    logits = model.eval()(torch.arange(40).view(2, 20)).logits
tokenizers = AutoTokenizer.from_pretrained(out), PreTrainedTokenizerFast.from_pretrained(out)
text = "你好，世界 hello 😀</s><pad>"
messages = [{"role": "user", "content": "你好"}]
for tokenizer in tokenizers:  # as its documentation shows it
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model.generate(**inputs, max_new_tokens=2)
print(json.dumps({
    "logits": logits.tolist(),
    "ids": [tokenizer(text)["input_ids"] for tokenizer in tokenizers],
    "chat": [t.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for t in tokenizers],
    "generation": model.generation_config.to_dict(),
}))
"""


def test_exported_folder_needs_nothing_of_ours(bloom, tokenizer, tmp_path):
    export(str(save(tmp_path / "a.ckpt", bloom, tokenizer)), str(tmp_path / "out"), max_shard_size="10KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    result = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])  # DeepSpeed, where transformers imports it, logs there too
    torch.testing.assert_close(torch.tensor(found["logits"]), logits(bloom), rtol=0, atol=0)
    assert found["ids"] == [tokenizer("你好，世界 hello 😀</s><pad>")["input_ids"]] * 2
    assert found["chat"] == [tokenizer.encode("<s>你好</s></s>")] * 2
    published = {
        "max_new_tokens": 200,
        "do_sample": True,
        "top_p": 0.85,
        "temperature": 0.35,
        "repetition_penalty": 1.2,
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert found["generation"].items() >= (published | ids).items()


def stored_weights(out):
    with safe_open(out / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_and_types_are_converted(tokenizer, tied, tmp_path):
    bloom = tiny_bloom(tie_word_embeddings=tied)
    export(str(save(tmp_path / "a.ckpt", bloom, tokenizer)), str(tmp_path / "out"), dtype="bfloat16")
    weights = stored_weights(tmp_path / "out")
    assert ("lm_head.weight" in weights) is not tied
    expected = bloom.state_dict()["transformer.h.1.mlp.dense_h_to_4h.weight"].bfloat16()
    assert torch.equal(weights["transformer.h.1.mlp.dense_h_to_4h.weight"], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_bloom(str(tmp_path / "out"), torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, bloom.lm_head.weight.bfloat16())


def test_exported_files_name_no_path_of_the_machine(tiny_folder, tokenizer, tmp_path):
    export(
        str(save(tmp_path / "a.ckpt", load_bloom(str(tiny_folder), torch.float32), tokenizer)), str(tmp_path / "out")
    )
    texts = [file.read_text(encoding="utf-8") for file in (tmp_path / "out").glob("*.json")]
    assert len(texts) >= 3
    assert not [text for text in texts if str(tiny_folder) in text]


def test_export_takes_the_latest_checkpoint_of_a_folder(bloom, tokenizer, tmp_path):
    for name in ("step=1.ckpt", "last.ckpt"):
        save(tmp_path / name, bloom, tokenizer)
    for name in (tmp_path, tmp_path / "last", tmp_path / "last.ckpt"):
        assert find_checkpoint(str(name)) == tmp_path / "last.ckpt"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    for name in (tmp_path / "run", tmp_path / "run" / "last"):
        assert find_checkpoint(str(name)).samefile(tmp_path / "last.ckpt"), "the folder of a run"
    with pytest.raises(FireflyError, match="no such checkpoint"):
        export(str(tmp_path / "first"), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FireflyError, match="holds no last"):
        export(str(tmp_path / "empty"), str(tmp_path / "out"))


def renamed(bloom):
    return {f"model.{name.replace('h.1.', 'h.7.')}": weight for name, weight in bloom.state_dict().items()}


def resized(bloom):
    return {f"model.{name}": weight[:8] for name, weight in bloom.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda bloom: {"state_dict": None}, "it has no state_dict"),
        (lambda bloom: {"hugging_face": None}, "it has no hugging_face"),
        (lambda bloom: {"hugging_face": {"config.json": {}}}, "it has no generation_config.json, tokenizer.json"),
        (lambda bloom: {"state_dict": {}}, "lacks transformer.h.0."),
        (lambda bloom: {"state_dict": renamed(bloom)}, "lacks transformer.h.1."),
        (lambda bloom: {"state_dict": resized(bloom)}, "has the sizes (8, 16)"),
        (lambda bloom: {"callback": Path()}, "holds pathlib"),
    ],
)
def test_export_refuses_what_is_no_whole_checkpoint(bloom, tokenizer, changes, message, tmp_path):
    save(tmp_path / "a.ckpt", bloom, tokenizer, **changes(bloom))
    with pytest.raises(FireflyError) as raised:
        export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    assert message in raised_line(raised)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04" + b"x" * 1000])
def test_a_damaged_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    for load in (AtomicCheckpointIO().load_checkpoint, lambda path: export(str(path), str(tmp_path / "out"))):
        with pytest.raises(FireflyError) as raised:
            load(path)
        assert raised_line(raised).startswith(f"{path}: damaged, or not a checkpoint")


def test_a_truncated_and_a_missing_checkpoint_are_named(bloom, tokenizer, tmp_path):
    path = save(tmp_path / "a.ckpt", bloom, tokenizer)
    path.write_bytes(path.read_bytes()[:-1000])
    for name, message in (("a.ckpt", "damaged"), ("b.ckpt", "No such file")):
        with pytest.raises(FireflyError, match=message) as raised:
            AtomicCheckpointIO().load_checkpoint(tmp_path / name)
        assert raised_line(raised).startswith(str(tmp_path / name))


def test_export_leaves_a_folder_in_use_alone(bloom, tokenizer, tmp_path):
    checkpoint = str(save(tmp_path / "a.ckpt", bloom, tokenizer))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FireflyError, match="not empty"):
        export(checkpoint, str(tmp_path / "out"))
    with pytest.raises(FireflyError, match="max_shard_size '5XB'"):
        export(checkpoint, str(tmp_path / "new"), max_shard_size="5XB")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.ckpt", "mine", "out"]


def test_a_save_that_is_interrupted_costs_nothing(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "检查点" / "last.ckpt"
    saved = {"step": 1, "pytorch-lightning_version": "2.6.6"}
    io.save_checkpoint(saved, path)

    def interrupted(checkpoint, file):
        file.write(b"half")
        assert [file.name for file in path.parent.glob("*.ckpt")] == ["last.ckpt"]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"step": 2}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert io.load_checkpoint(path) == saved


FULL_DISK = textwrap.dedent("""
    import resource, signal, sys
    from pathlib import Path
    import torch
    from firefly_lightning.checkpoints.io_plugin import AtomicCheckpointIO
    from firefly_lightning.export import export
    from firefly_lightning.errors import FireflyError

    folder = Path(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    for attempt in (
        lambda: AtomicCheckpointIO().save_checkpoint({"step": 2, "weight": torch.zeros(50_000)}, folder / "a.ckpt"),
        lambda: export(str(folder / "a.ckpt"), str(folder / "out")),
    ):
        try:
            attempt()
        except FireflyError as error:
            print(error)
""")


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(bloom, tokenizer, tmp_path):
    path = save(tmp_path / "a.ckpt", bloom, tokenizer)
    before = path.read_bytes()
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    messages = [line for line in result.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert len(messages) == 2
    assert messages[0].startswith(f"{path}: File too large; the checkpoint was not saved")
    assert messages[1].startswith(f"{tmp_path / 'out'}: ")
    assert "too large" in messages[1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    assert path.read_bytes() == before


class Line(L.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder, steps, resume=None):
    torch.manual_seed(0)
    callbacks = [ModelCheckpoint(folder, monitor="loss", every_n_train_steps=1, save_last=True)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, EarlyStopping("loss"), Timer(duration={"hours": 1})],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Line()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 4)), ckpt_path=resume)
    return module.layer.weight.detach()


def test_lightning_saves_and_resumes_through_it(tmp_path):
    expected = fit(tmp_path / "whole", steps=4)
    fit(tmp_path / "part", steps=2)
    resumed = fit(tmp_path / "part", steps=4, resume=tmp_path / "part" / "last.ckpt")
    assert torch.equal(resumed, expected)
    assert not list(tmp_path.rglob("*.partial"))


def test_objects_are_loaded_only_on_request(tmp_path):
    io = AtomicCheckpointIO()
    saved = {"where": Path("a"), "pytorch-lightning_version": "2.6.6"}
    io.save_checkpoint(saved, tmp_path / "a.ckpt")
    with pytest.raises(FireflyError, match=r"holds pathlib\.\w+, which could run code"):
        io.load_checkpoint(tmp_path / "a.ckpt")
    assert io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False) == saved


def test_a_file_of_another_program_is_refused(tmp_path):
    """Where a run is resumed: Lightning's own processes hand weights over in a file that is read, too."""
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(FireflyError, match=r"a\.ckpt: is not a checkpoint of a run"):
        fit(tmp_path / "run", steps=1, resume=tmp_path / "a.ckpt")
    module = Line()
    AtomicCheckpointIO().save_checkpoint(module.state_dict(), tmp_path / "b.ckpt")
    read = AtomicCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")
    assert read._metadata == module.state_dict()._metadata
    assert Line().load_state_dict(read) == module.load_state_dict(module.state_dict())
    with pytest.raises(KeyError, match="none"):
        _ = read["none"]


def test_a_checkpoint_that_is_not_there_is_a_missing_file_to_others(tmp_path, bloom, tokenizer):
    """Who calls Lightning expects a FileNotFoundError; a command says so in a line."""
    none, made = tmp_path / "none.ckpt", tmp_path / "a.ckpt"
    for resume in (
        lambda: fit(tmp_path / "run", steps=1, resume=none),
        lambda: AtomicCheckpointIO().load_checkpoint(none),
        lambda: find_checkpoint(str(none)),
        lambda: ShardedCheckpoints.load_checkpoint(SimpleNamespace(), none),
    ):
        with pytest.raises(FileNotFoundError, match=r"none\.ckpt: (no such checkpoint|No such file)") as raised:
            resume()
        assert isinstance(raised.value, FireflyError)
        assert raised_line(raised).startswith(str(none))
    description = describe(bloom.config, tokenizer, PRESETS["firefly"])
    whole = {"state_dict": {}, "optimizer_parameters": [], "hugging_face": description}
    AtomicCheckpointIO().save_checkpoint(whole, made)
    (made / "trainer.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainer\.ckpt: missing"):
        AtomicCheckpointIO().load_checkpoint(made)


def test_the_scaler_of_a_loss_lies_where_lightning_keeps_its_own():
    assert MixedPrecision.__qualname__ == layout.SCALER_KEY


def test_other_filesystems_are_left_to_lightning():
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, "memory://firefly/a.ckpt")
    assert io.load_checkpoint("memory://firefly/a.ckpt") == {"step": 1}
