"""What tests of `firefly-fit predict` need: a model that knows answers by heart, and what stock code answers."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BloomForCausalLM

from firefly_lightning import FireflyError, FireflyModule
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.huggingface import load_tokenizer
from tests.support.reference import backward, labelled

LONGEST = 12
GREEDY = {"max_new_tokens": LONGEST, "do_sample": False, "repetition_penalty": 1.0}
DECODING = ["--model.decoding", json.dumps(GREEDY)]


def teach(folder: Path, rows_file: Path, out: Path, steps: int = 30) -> Path:
    """A copy of a model that has learned the rows by heart, with stock code alone."""
    model, rows = BloomForCausalLM.from_pretrained(folder).float(), labelled(folder, rows_file)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        backward(model, rows)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    load_tokenizer(str(folder)).save_pretrained(out)
    return out


def answers(folder: Path, rows_files: Sequence[Path]) -> list[dict[str, str]]:
    """What greedy prediction must give: stock Bloom, one row at a time."""
    model, tokenizer = BloomForCausalLM.from_pretrained(folder).float().eval(), load_tokenizer(str(folder))
    found = []
    for row in (row for file in rows_files for row in read_rows(str(file))):
        source, target = row.turns[0]
        # Special tokens that a row's author typed are ordinary text.
        question = tokenizer(source, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = torch.tensor([[1, *question, 2, 2]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=2, pad_token_id=3, **GREEDY)
        generated = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found.append({"kind": row.kind, "input": source, "target": target, "generated": generated})
    return found


def predicted(root: Path, version: int) -> list[dict[str, str]]:
    """Rows of a run's predictions.jsonl."""
    path = root / "lightning_logs" / f"version_{version}" / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Recorded(FireflyModule):
    """Leaves what each rank answered in the run's folder."""

    def predict_step(self, batch, batch_idx):
        found = super().predict_step(batch, batch_idx)
        file = Path(self.trainer.default_root_dir) / f"rank-{self.global_rank}.json"
        earlier = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(earlier | {row["row"]: row["generated"] for row in found}))
        return found


class Failing(FireflyModule):
    """Ends in the third micro-batch of a prediction."""

    def predict_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise FireflyError("enough")
        return super().predict_step(batch, batch_idx)
