"""A disk that takes its time, so that a training goes on while checkpoints are written."""

import time
from pathlib import Path

from firefly_lightning import FireflyModule
from firefly_lightning.files import manifest

WRITE_FILE = manifest.write_file


class OnASlowDisk(FireflyModule):
    """A module whose run writes each file of tensors slowly, and notes at which step and beside which checkpoints."""

    def __init__(self, seconds: float, *args, fails_at: int = 10**9, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.fails_at = seconds, fails_at

    def on_fit_start(self):
        super().on_fit_start()
        root = Path(self.trainer.default_root_dir)

        def write_file(path, *parts):
            time.sleep(self.seconds)
            whole = sorted(file.parent.name for file in path.parent.parent.glob("*/checkpoint.json"))
            whole = [name for name in whole if not name.startswith(".")]
            with (root / f"writes-{self.global_rank}.txt").open("a") as file:
                print(path.parent.name, self.global_step, *whole, file=file)
            yield from WRITE_FILE(path, *parts)

        manifest.write_file = write_file

    def training_step(self, batch, batch_idx):
        if batch["step"] == self.fails_at:
            raise RuntimeError("the training fails")
        return super().training_step(batch, batch_idx)

    def teardown(self, stage):
        manifest.write_file = WRITE_FILE
