"""Describes the machine that a figure was measured on, and the memory of a process."""

import contextlib
import ctypes
import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Processor, its speed and cores, versions of packages and the date, to record beside a figure."""
    from benchmarks.floor import product_rate  # not above: importing torch counts for what is measured

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
        "gflop/s": round(product_rate("fp32") / 1e9),
        "date": datetime.date.today().isoformat(),
    }


def peak_gb() -> float:
    """Most memory that this process has held, in GB; getrusage would begin with the memory of the parent process."""
    peak = next(line.split()[1] for line in _lines("/proc/self/status") if line.startswith("VmHWM:"))
    return round(int(peak) * 1024 / 1e9, 2)


def reset_peak() -> None:
    """Has :func:`peak_gb` count from what this process holds now, with freed memory given back."""
    with contextlib.suppress(OSError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # proc(5)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
