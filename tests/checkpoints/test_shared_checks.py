"""The processes of a run on one machine check a checkpoint together: each byte once, and damage is found by all."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from firefly_lightning.checkpoints.portable import PortableReader
from firefly_lightning.checkpoints.unsharded import write_whole
from firefly_lightning.errors import FireflyError
from tests.support.helpers import forked, free_port

PARTS, SIZE = 12, 2**20


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """A checkpoint of several files of 4 MiB each."""
    monkeypatch.setattr("firefly_lightning.checkpoints.portable.FLUSH_BYTES", 4 * SIZE)
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    weights = {f"model.{number}": torch.randn(SIZE) for number in range(PARTS)}
    trainer = {"pytorch-lightning_version": "2.6.6", "global_step": 1, "loops": {}, "callbacks": {}, "epoch": 0}
    write_whole(trainer | {"state_dict": weights, "optimizer_parameters": []}, folder)
    return folder


def opened(rank: int, port: str, folder: Path, out: Path) -> None:
    """Opens a checkpoint as one of two processes; notes how many bytes this one read, and what it found."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dist.barrier()
    before = bytes_read()
    try:
        PortableReader(folder)
        found = "whole"
    except FireflyError as error:
        found = str(error)
    out.write_text(json.dumps({"read": bytes_read() - before, "found": found}))
    dist.barrier()
    dist.destroy_process_group()


def bytes_read() -> int:
    """Bytes that this process has read by calls of the system, from a disk or from the cache of pages."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def by_two(folder: Path) -> list[dict]:
    outs, port = [folder.with_name(f"found-{rank}") for rank in range(2)], free_port()
    processes = [forked(opened, rank, port, folder, out) for rank, out in enumerate(outs)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads(out.read_text()) for out in outs]


def test_each_byte_is_read_once_by_one_of_two_processes(checkpoint):
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    found = by_two(checkpoint)
    assert [one["found"] for one in found] == ["whole"] * 2
    assert size <= sum(one["read"] for one in found) < 1.1 * size
    assert all(one["read"] > 0.1 * size for one in found), "both take part"


def test_damage_is_found_by_both(checkpoint):
    file = checkpoint / "model-0-2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    line = f"{file}: damaged, its contents have changed; use an earlier checkpoint"
    assert [one["found"] for one in by_two(checkpoint)] == [line] * 2
