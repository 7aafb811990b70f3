"""Loss and every gradient of a step are those of TRL's own DPOTrainer, on the same pairs, weights and reference."""

import json
import math

import lightning as L
import pytest
import torch
from transformers import BloomForCausalLM, TrainerCallback

from firefly_lightning import PreferenceDataModule, PreferenceModule
from firefly_lightning.huggingface import load_tokenizer
from tests.conftest import write_rows
from tests.support.small_runs import settings

if torch.__version__.startswith("2.5."):
    # `bin/test` has TRL in the environment of the current stack; there, a missing package is a failure.
    pytest.skip("the oldest stack is without the extra benchmarks", allow_module_level=True)

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

BETA, LR, PAIRS = 0.3, 0.3, 8


@pytest.fixture(scope="module")
def pairs(pairs_file) -> list[dict]:
    """Of one turn, since TRL has no form for the rest of our format as plain text."""
    rows = [json.loads(line) for line in pairs_file.read_text("utf-8").splitlines()]
    return [{key: row[key] for key in ("input", "chosen", "rejected")} for row in rows if "history" not in row][:PAIRS]


class Noting(TrainerCallback):
    """Notes the gradients of every step of TRL's trainer."""

    def __init__(self):
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def of_trl(folder, pairs, root, loss: str, smoothing: float):
    """Losses and gradients of two steps of plain gradient descent under TRL; the second is away from the reference."""
    rows = [{"prompt": f"<s>{one['input']}</s></s>", **{k: one[k] for k in ("chosen", "rejected")}} for one in pairs]
    model = BloomForCausalLM.from_pretrained(folder).float()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    noting = Noting()
    config = DPOConfig(
        output_dir=str(root), loss_type=[loss], beta=BETA, label_smoothing=smoothing, max_length=None, max_steps=2,
        per_device_train_batch_size=PAIRS, max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, precompute_ref_log_probs=True, gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(str(folder)),
        optimizers=(optimizer, schedule), callbacks=[noting],
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], noting.grads


class Recording(PreferenceModule):
    def on_fit_start(self):
        super().on_fit_start()
        self.grads, self.logged = [], []

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.grads.append({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()})
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


def of_firefly(folder, pairs, root, loss: str, smoothing: float):
    file = write_rows(root / "pairs.jsonl", pairs)
    data = PreferenceDataModule(str(folder), str(file), batch_size=PAIRS, micro_batch_size=2)
    module = Recording(
        str(folder), beta=BETA, loss=loss, label_smoothing=smoothing,
        optimizer=lambda parameters: torch.optim.SGD(parameters, LR),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1),
    )  # fmt: skip
    L.Trainer(max_steps=2, default_root_dir=root, **settings()).fit(module, data)
    return module.logged, module.grads


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0)])
def test_loss_and_gradients_are_those_of_dpo_trainer(loss, smoothing, model_folder, pairs, tmp_path):
    theirs, their_grads = of_trl(model_folder, pairs, tmp_path / "trl", loss, smoothing)
    ours, our_grads = of_firefly(model_folder, pairs, tmp_path, loss, smoothing)
    assert len(theirs) == len(ours) == 2
    for step in (0, 1):
        # TRL logs rounded numbers.
        assert math.isclose(ours[step]["train_loss"], theirs[step]["loss"], rel_tol=1e-5, abs_tol=5e-5)
        assert our_grads[step].keys() == their_grads[step].keys()
        for name, grad in their_grads[step].items():
            apart = float((our_grads[step][name] - grad).norm() / grad.norm().clamp(min=1e-9))
            assert apart < 1e-5 * (1 + step), (step, name, apart)
        for name, key in (("reward_accuracy", "accuracies"), ("reward_margin", "margins")):
            found, told = ours[step][f"train_{name}"], theirs[step][f"rewards/{key}"]
            assert math.isclose(found, told, rel_tol=1e-3, abs_tol=1e-4), name
        for name in ("chosen", "rejected"):
            assert math.isclose(ours[step][f"train_{name}_log_prob"], theirs[step][f"logps/{name}"], rel_tol=1e-4)
