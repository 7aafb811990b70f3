"""What a figure was measured on."""

import datetime
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """Processor, its pace, cores, releases and date, for the record beside a figure."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    packages = ("torch", "transformers", "lightning", "deepspeed", "colossalai")
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        **{name: release for name in packages if (release := _version(name))},
        "python": platform.python_version(),
        "gflop/s": product_rate(),
        "date": datetime.date.today().isoformat(),
    }


def product_rate(size: int = 2048, times: int = 5) -> int:
    """10⁹ operations a second of bare products in float32, the fastest of a few: shows what else a machine is doing."""
    left, seconds = torch.randn(size, size), []
    for _ in range(times):
        began = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - began)
    return round(2 * size**3 / min(seconds) / 1e9)


def peak_gb() -> float:
    """Most memory that this process has held, in GB; not getrusage's, which begins with that of the parent process."""
    peak = next(line.split()[1] for line in _lines("/proc/self/status") if line.startswith("VmHWM:"))
    return round(int(peak) * 1024 / 1e9, 2)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
