"""No process holds a second copy of what is saved, unless it is told to write it beside the run, under any strategy."""

import json
from filecmp import cmp
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig

from firefly_lightning import FireflyModule
from firefly_lightning.callbacks.unfinished_saves import settle
from firefly_lightning.checkpoints import portable
from firefly_lightning.huggingface import load_tokenizer
from tests.integration.test_moving import command
from tests.integration.test_parity import REFUSED, STRATEGIES
from tests.support.choice import DIVIDED
from tests.support.helpers import memory_taken, run_ranks

HIDDEN, LAYERS = 320, 12

# Gemini gathers chunks; these are not much larger than the largest weight.
SMALL_CHUNKS = json.dumps(
    {"class_path": "firefly_lightning.strategies.GeminiStrategy", "init_args": {"min_chunk_size_m": 0.5}}
)
OPTIONS = {"gemini": ["--trainer.strategy", SMALL_CHUNKS]}
CHECKED = ("zero3", "gemini", "fsdp2") if DIVIDED else ("auto", "zero2", "zero3", "gemini", "tensor_parallel", "fsdp2")


class Saving(FireflyModule):
    """Saves again when it has trained, a megabyte at a time, and tells how much memory that took at its peak.

    Then it saves beside what this thread does, which gives the weights other values at once.
    """

    def on_train_end(self):
        portable.FLUSH_BYTES = 2**20
        root = Path(self.trainer.default_root_dir)
        with memory_taken(0.005, trims=True) as taken:  # what engines have freed is no copy
            self.trainer.save_checkpoint(root / "again.ckpt")
        (root / f"taken-{self.global_rank}.json").write_text(json.dumps(taken[0]))
        io = self.trainer.strategy.checkpoint_io.in_background()
        self.trainer.strategy.checkpoint_io = io
        self.trainer.save_checkpoint(root / "aside.ckpt")
        for tensors in (self.parameters(), *(state.values() for one in self.optimizers_of() for state in one)):
            for tensor in tensors:
                own = getattr(tensor, "_local_tensor", tensor)
                if isinstance(own, torch.Tensor) and own.untyped_storage().size():  # Gemini frees what it shards
                    own.data.zero_()
        settle(self.trainer)

    def optimizers_of(self):
        """The states of every optimizer, those inside an engine's own too, by parameter."""
        for optimizer in self.trainer.optimizers:
            for one in (optimizer, getattr(optimizer, "optimizer", None), getattr(optimizer, "optim", None)):
                if one is not None and hasattr(one, "state"):
                    yield [state for state in one.state.values() if isinstance(state, dict)]


@pytest.fixture(scope="module")
def larger_folder(odd_folder, tmp_path_factory) -> Path:
    """A configuration of about 15 million parameters, its largest a thirtieth of them; weights are drawn."""
    folder = tmp_path_factory.mktemp("larger")
    load_tokenizer(str(odd_folder)).save_pretrained(folder)
    BloomConfig(vocab_size=1499, hidden_size=HIDDEN, n_layer=LAYERS, n_head=10, pad_token_id=3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", [name for name in CHECKED if name not in REFUSED])
def test_saving_takes_a_small_part_of_what_is_saved(strategy, larger_folder, fit_args, tmp_path):
    processes, _ = STRATEGIES[strategy]
    drawn = ["--model.from_scratch", "true", "--model.path", larger_folder, "--trainer.enable_checkpointing", "false"]
    own = [
        "--model",
        "tests.integration.test_saving.Saving",
        *drawn,
        "--trainer.max_steps",
        1,
        *OPTIONS.get(strategy, []),
    ]
    print(run_ranks(processes, command(fit_args, strategy, "32-true", tmp_path, *own)))
    saved = sum(file.stat().st_size for file in (tmp_path / "again.ckpt").glob("*.safetensors"))
    assert saved > 3 * 4 * LAYERS * 12 * HIDDEN**2, "weights and two moments, in float32"
    for rank in range(processes):
        taken = json.loads((tmp_path / f"taken-{rank}.json").read_text())
        print(f"{strategy}, rank {rank}: {taken / 2**20:.0f} MiB of {saved / 2**20:.0f} MiB")
        assert taken < saved / 4
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("again.ckpt", "aside.ckpt")]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert cmp(tmp_path / "again.ckpt" / name, tmp_path / "aside.ckpt" / name, shallow=False), name
