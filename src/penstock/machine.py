"""What this process runs on and with: for `result.json`, `doctor` and the benchmarks."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from penstock import __version__
from penstock.storage.budget import num_threads, total_memory

_PACKAGES = ("torch", "numpy", "numba", "pyarrow", "dgl", "torch_geometric", "ray", "safetensors")


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python, Penstock and what it computes with."""
    return {
        "python": platform.python_version(),
        "penstock": __version__,
        **{name: package_version(name) for name in _PACKAGES},
    }


def processor() -> str:
    """The processor's name, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Processor, cores and memory that this process may use, load, host and kernel."""
    return {
        "processor": processor(),
        "cores": num_threads(),
        "memory_bytes": total_memory(),
        "load_1min": os.getloadavg()[0],
        "host": platform.node(),
        "system": platform.platform(),
    }
