"""What needs a GPU: every strategy there, loss scaling, and an answer. Not run where there is none."""

import os
import subprocess

import pytest
import torch

from tests.integration.test_parity import STRATEGIES, differences
from tests.support.helpers import BIN, ROOT

pytestmark = pytest.mark.gpu


def run_on_gpus(*command: object) -> str:
    """One thread a process, as everywhere; all GPUs can be seen."""
    name, *args = (str(part) for part in command)
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [str(BIN / name), *args], capture_output=True, text=True, cwd=ROOT, env=os.environ | own, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 2e-2), ("16-mixed", 2e-2)])
def test_a_strategy_trains_on_gpus_as_plain_pytorch_on_the_processor(
    strategy, precision, tolerance, fit_args, expected, tmp_path
):
    if precision == "16-mixed" and strategy in ("fsdp2", "native_tp"):
        pytest.skip("PyTorch's own parallelism has no loss scaling; its refusal is tested on the processor")
    processes = min(STRATEGIES[strategy][0], torch.cuda.device_count())
    own = ["--trainer.strategy", strategy, "--trainer.precision", precision]
    places = ["--trainer.accelerator", "gpu", "--trainer.devices", processes]
    run_on_gpus(*fit_args(tmp_path, 1e-4, *own, *places))
    assert not differences(tmp_path, expected[1e-4], tolerance, precision)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_answers_on_a_gpu(dtype, odd_folder):
    prompt = ["--prompt", "评论：房间很大。", "--max_new_tokens", 8, "--device", "cuda:0", "--dtype", dtype]
    assert run_on_gpus("firefly", "chat", "--model", odd_folder, *prompt).strip()
