"""Loss and every gradient of a step are those of stock Bloom in plain PyTorch, however a step is cut up."""

import csv
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import BloomForCausalLM

from firefly_lightning import FireflyError, PreferenceDataModule, PreferenceModule
from firefly_lightning.callbacks.run_figures import draw_losses, draw_pairs, read_metrics
from tests.conftest import write_rows
from tests.support.helpers import fit, logged, one_line, run
from tests.support.pair_runs import (
    BETA,
    PREFERENCE,
    labelled_pairs,
    made_pairs,
    pair_backward,
    plain_loss,
    reference_of,
    row_log_prob,
)
from tests.support.small_runs import settings

LR = 0.3
"""Of plain gradient descent: after a step, the model is not its own reference any more."""

DESCENT = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", LR,
           "--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor", 1,
           "--trainer.max_steps", 2, "--data.batch_size", 8]  # fmt: skip

RECORD = ["--model", "tests.support.helpers.RecordingOnPairs"]

FIGURES = ("reward_accuracy", "reward_margin", "chosen_log_prob", "rejected_log_prob")


def steps_of(folder, pairs_file, count: int) -> list[list[int]]:
    data = PreferenceDataModule(str(folder), str(pairs_file), batch_size=8)
    data.prepare_data()
    data.setup("fit")
    return [data.train.plan.rows(step).tolist() for step in range(count)]


def descended(folder, pairs_file, loss="sigmoid", smoothing=0.0):
    """Loss, gradients and figures of two steps of plain gradient descent."""
    pairs, model = labelled_pairs(folder, pairs_file), BloomForCausalLM.from_pretrained(folder).float()
    reference, found = reference_of(model, pairs), []
    for numbers in steps_of(folder, pairs_file, 2):
        model.zero_grad()
        step, known = [pairs[number] for number in numbers], [reference[number] for number in numbers]
        figures = figures_of(model, step, known)
        value = pair_backward(model, step, known, loss, BETA, smoothing)
        found.append((value, {name: one.grad.clone() for name, one in model.named_parameters()}, figures))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
    return found


@torch.no_grad()
def figures_of(model, pairs, reference) -> dict[str, float]:
    rows = []
    for pair, known in zip(pairs, reference, strict=True):
        chosen, rejected = (row_log_prob(model, row)[0] for row in pair)
        rewards = [BETA * float(of - was) for of, was in zip((chosen, rejected), known, strict=True)]
        rows.append((rewards[0] > rewards[1], rewards[0] - rewards[1], float(chosen), float(rejected)))
    return {name: sum(values) / len(pairs) for name, values in zip(FIGURES, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module")
def expected(model_folder, pairs_file):
    return descended(model_folder, pairs_file)


def check(root: Path, expected, ranks: int = 1, tolerance: float = 1e-5) -> None:
    for step, (loss, grads, figures) in enumerate(expected):
        assert math.isclose(float(logged(root)[step]), loss, rel_tol=tolerance), step
        for rank in range(ranks):
            found = torch.load(root / f"grads-{step}-{rank}.pt")
            assert found.keys() == grads.keys()
            for name, grad in grads.items():
                apart = float((found[name] - grad).norm() / grad.norm().clamp(min=1e-9))
                assert apart < 3 * tolerance, (step, name, apart)
        for name, value in figures.items():
            assert math.isclose(float(logged(root, f"train_{name}")[step]), value, rel_tol=1e-4, abs_tol=1e-4), name


CUTS = {
    "1 micro-batch": [],
    "4 micro-batches": ["--data.micro_batch_size", 2],
    "without a shared prompt": ["--model.share_prompts", "false", "--data.micro_batch_size", 4],
    "gradient checkpointing": ["--model.gradient_checkpointing", "true"],
    "Hugging Face's own pass": ["--model.attention", "eager"],
    "2 ranks of 2 micro-batches": ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.micro_batch_size", 2],
}


@pytest.mark.parametrize("cut", CUTS)
def test_loss_gradients_and_figures_equal_stock_bloom(cut, model_folder, pairs_file, tmp_path, expected):
    fit(model_folder, pairs_file, tmp_path, *PREFERENCE, *RECORD, *DESCENT, *CUTS[cut])
    check(tmp_path, expected, 2 if "ddp" in CUTS[cut] else 1)


def test_the_first_loss_is_that_of_a_model_that_is_its_own_reference(expected):
    assert math.isclose(expected[0][0], math.log(2), rel_tol=1e-6)
    assert expected[1][0] < 0.9 * expected[0][0]


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.1), ("ipo", 0.0)])
def test_other_losses(loss, smoothing, model_folder, pairs_file, tmp_path):
    own = ["--model.loss", loss, "--model.label_smoothing", smoothing]
    fit(model_folder, pairs_file, tmp_path, *PREFERENCE, *RECORD, *DESCENT, *own)
    check(tmp_path, descended(model_folder, pairs_file, loss, smoothing))


def test_the_last_short_step_of_an_epoch(model_folder, pairs_file, tmp_path):
    """36 pairs make four steps of 8 and one of 4; of two ranks with two micro-batches of 2, some hold one pair."""
    losses = []
    for name, own in {"one": [], "two": CUTS["2 ranks of 2 micro-batches"]}.items():
        fit(model_folder, pairs_file, tmp_path / name, *PREFERENCE, *DESCENT, *own, "--trainer.max_steps", 5)
        losses.append([float(loss) for _, loss in sorted(logged(tmp_path / name).items())])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_noise_and_dropout_spare_the_reference_and_validation(model_folder, pairs_file, tmp_path):
    noisy = ["--model.neftune_noise_alpha", 5, "--data.val_files", pairs_file, "--trainer.val_check_interval", 1]
    fit(model_folder, pairs_file, tmp_path, *PREFERENCE, *DESCENT, *noisy, "--model.optimizer.lr", 0)
    assert float(logged(tmp_path)[0]) != pytest.approx(math.log(2), abs=1e-6)
    found = [float(loss) for loss in logged(tmp_path, "val_loss").values()]
    assert found == pytest.approx([math.log(2)] * 2, rel=1e-6)


@pytest.fixture(scope="module")
def metrics_of_val(model_folder, pairs_file, val_pairs_file):
    """Metrics of validation pairs after a step of plain gradient descent, over all and by kind; in float64."""
    pairs, val = labelled_pairs(model_folder, pairs_file), labelled_pairs(model_folder, val_pairs_file)
    model = BloomForCausalLM.from_pretrained(model_folder).double()
    known, of_val = reference_of(model, pairs), reference_of(model, val)
    (numbers,) = steps_of(model_folder, pairs_file, 1)
    pair_backward(model, [pairs[number] for number in numbers], [known[number] for number in numbers])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
    kinds = [json.loads(line)["kind"] for line in val_pairs_file.read_text("utf-8").splitlines()]
    found = {}
    for kind in (None, *sorted(set(kinds))):
        taken = [at for at, name in enumerate(kinds) if kind in (None, name)]
        figures = figures_of(model, [val[at] for at in taken], [of_val[at] for at in taken])
        found |= {f"val_{name}{f'_of/{kind}' if kind else ''}": value for name, value in figures.items()}
    losses = []
    with torch.no_grad():
        for pair, before in zip(val, of_val, strict=True):
            ratios = [row_log_prob(model, row)[0] - was for row, was in zip(pair, before, strict=True)]
            losses.append(float(plain_loss(ratios[0] - ratios[1], "sigmoid", BETA, 0.0)))
    return found | {"val_loss": sum(losses) / len(losses)}


def check_validation(root: Path, expected, step: int = 0) -> None:
    for name, value in expected.items():
        assert math.isclose(float(logged(root, name)[step]), value, rel_tol=1e-4, abs_tol=1e-4), name


def test_metrics_of_validation_by_kind(model_folder, pairs_file, val_pairs_file, metrics_of_val, tmp_path):
    own = ["--data.val_files", val_pairs_file, "--trainer.val_check_interval", 1, "--trainer.max_steps", 1]
    fit(model_folder, pairs_file, tmp_path, *PREFERENCE, *DESCENT, *own, figures=True)
    check_validation(tmp_path, metrics_of_val)
    folder = tmp_path / "lightning_logs" / "version_0"
    text = (folder / "report.md").read_text("utf-8")
    assert "![pairs.png](pairs.png)" in text
    assert "reward accuracy in training, first and last" in text
    assert "| Summary" in text
    assert (folder / "pairs.png").stat().st_size > 10_000
    assert list((tmp_path / "checkpoints").glob("best-step=1-val_loss=0.*.ckpt"))


def test_metrics_are_the_same_on_two_ranks_and_in_a_validation_of_its_own(
    model_folder, pairs_file, val_pairs_file, metrics_of_val, tmp_path
):
    """The reference is the checkpoint's, whose weights are not it."""
    own = ["--data.val_files", val_pairs_file, "--trainer.val_check_interval", 1, "--trainer.max_steps", 1]
    fit(model_folder, pairs_file, tmp_path / "two", *PREFERENCE, *DESCENT, *own, *CUTS["2 ranks of 2 micro-batches"])
    check_validation(tmp_path / "two", metrics_of_val)
    common = ["--model.path", model_folder, "--data.val_files", val_pairs_file, "--trainer.accelerator", "cpu"]
    checkpoint = ["--ckpt_path", tmp_path / "two" / "checkpoints" / "last.ckpt"]
    for command, name in (("validate", "val"), ("test", "test")):
        root = tmp_path / command
        more = ["--trainer.default_root_dir", root, "--trainer.devices", 1, "--model.decoding.max_new_tokens", 4]
        printed = run("firefly-fit", command, *PREFERENCE, *common, *checkpoint, *more).stdout
        assert "reward_accuracy" in printed
        found = {key.replace("val_", f"{name}_", 1): value for key, value in metrics_of_val.items()}
        with (root / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
            (row,) = list(csv.DictReader(file))
        for key, value in found.items():
            assert math.isclose(float(row[key]), value, rel_tol=1e-4, abs_tol=1e-4), key


def test_a_model_before_training_is_its_own_reference(model_folder, val_pairs_file, tmp_path):
    common = ["--model.path", model_folder, "--data.val_files", val_pairs_file, "--trainer.accelerator", "cpu"]
    run("firefly-fit", "validate", *PREFERENCE, *common, "--trainer.default_root_dir", tmp_path)
    assert float(logged(tmp_path, "val_loss")[0]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(logged(tmp_path, "val_reward_margin")[0]) == 0


def test_prompts_are_answered_as_ever(model_folder, val_pairs_file, tmp_path):
    common = ["--model.path", model_folder, "--data.predict_files", val_pairs_file, "--trainer.accelerator", "cpu"]
    more = ["--trainer.default_root_dir", tmp_path, "--model.decoding", '{"max_new_tokens": 4, "do_sample": false}']
    run("firefly-fit", "predict", *PREFERENCE, *common, *more)
    (file,) = tmp_path.rglob("predictions.jsonl")
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    pairs = [json.loads(line) for line in val_pairs_file.read_text("utf-8").splitlines()]
    assert [row["target"] for row in found] == [pair["chosen"] for pair in pairs]
    assert all(row["input"].endswith(pair["input"]) for row, pair in zip(found, pairs, strict=True))


REFUSED = {
    "--model.beta 0": "model.beta",
    "--model.label_smoothing 0.5": "model.label_smoothing is 0.5; it must be at least 0 and below 0.5",
    "--model.loss ipo --model.label_smoothing 0.1": "model.label_smoothing is of the sigmoid loss only",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_arguments_out_of_range_are_refused(typed, model_folder, pairs_file, tmp_path):
    result = fit(model_folder, pairs_file, tmp_path, *PREFERENCE, *typed.split(), check=False)
    assert one_line(result).startswith(REFUSED[typed])


def test_a_loss_that_is_not_finite_names_the_pairs(model_folder, pairs_file, tmp_path):
    class Broken(PreferenceModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

        def summed_loss(self, batch):
            summed = super().summed_loss(batch)
            return summed._replace(loss=summed.loss * math.nan)

    module, data = Broken(str(model_folder)), PreferenceDataModule(str(model_folder), str(pairs_file), batch_size=8)
    with pytest.raises(FireflyError, match=r"step 0: loss nan.*pairs.jsonl:\d+ \(Summary\)"):
        L.Trainer(max_steps=1, default_root_dir=tmp_path, **settings()).fit(module, data)


def test_a_run_of_weights_that_are_not_kept_in_files_is_its_own_reference(model_folder, pairs_file, tmp_path):
    fit(model_folder, pairs_file, tmp_path, *PREFERENCE, *DESCENT, "--model.from_scratch", "true")
    assert float(logged(tmp_path)[0]) == pytest.approx(math.log(2), rel=1e-6)


def test_figures_without_a_validation(tmp_path):
    names = ["step", "train_loss", "train_reward_accuracy", "train_reward_margin", "train_chosen_log_prob",
             "train_rejected_log_prob"]  # fmt: skip
    lines = [",".join(names), *(f"{step},0.6,0.5,0.1,-20,-30" for step in range(3))]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    metrics = read_metrics(tmp_path)
    draw_losses(metrics, tmp_path / "loss.png")
    draw_pairs(metrics, tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 10_000


def test_pairs_of_one_length_and_one_pair_a_step(model_folder, reviews, tmp_path):
    file = write_rows(tmp_path / "one.jsonl", made_pairs(reviews, 1) * 2)
    fit(model_folder, file, tmp_path / "run", *PREFERENCE, "--trainer.max_steps", 2, "--data.batch_size", 1)
    assert sorted(logged(tmp_path / "run")) == [0, 1]
