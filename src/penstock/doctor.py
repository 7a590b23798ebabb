"""`penstock doctor`: look at the machine as a run would, and say what to do."""

import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from penstock.disk_rates import measure_anew
from penstock.display import print_table
from penstock.kernels import cache
from penstock.machine import package_version
from penstock.planned import planned_memory
from penstock.process_memory import forecast_rows, process_bytes
from penstock.storage.budget import (
    available_memory,
    default_host_bytes,
    format_bytes,
    free_disk,
    num_threads,
    total_memory,
)
from penstock.storage.directio import PAGE, DirectFile, aligned_buffer
from penstock.storage.extras import install_command

Finding = tuple[str, str, str]  # name, value, what to do (empty: nothing)


def _disk(folder: Path) -> Iterator[Finding]:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        buffer: np.ndarray[tuple[int], np.dtype[np.uint8]] = aligned_buffer(PAGE)
        with DirectFile(Path(file.name), "write") as direct:
            direct.write_from(buffer, 0, PAGE)
            works = direct.direct
    remedy = "" if works else "put the run folder on ext4 or XFS; through the page cache, budgets are less exact"
    yield "O_DIRECT", "works" if works else "refused", remedy
    rates = measure_anew(folder)
    slow = "" if rates.read_bytes_per_s > 500e6 else "a local NVMe disk reads 1 GB/s and more"
    yield "sequential read", f"{format_bytes(rates.read_bytes_per_s)}/s", slow
    yield "sequential write", f"{format_bytes(rates.write_bytes_per_s)}/s", ""
    yield "4 KiB random reads", f"{rates.random_reads_per_s:,.0f}/s", ""
    free = free_disk(folder)
    yield "free disk", format_bytes(free), "" if free > 10 << 30 else "packs need room; see penstock plan"


def _memory(folder: Path) -> Iterator[Finding]:
    total, free = total_memory(), available_memory()
    yield "memory of the container", format_bytes(total), ""
    yield "memory free", format_bytes(free), "" if free > total // 4 else "stop something, or set --host-memory"
    importlib.import_module("penstock.run_verbs")  # a process is measured that has loaded what a run loads
    process = process_bytes()
    left = default_host_bytes(process)
    yield (
        "interpreter and libraries",
        format_bytes(process),
        "" if left > 0 else "no room for data; use a larger container",
    )
    yield "left for model and --host-memory", format_bytes(max(0, left)), ""
    memory = planned_memory(folder)
    if memory is not None:
        peak = int(memory["predicted_peak_bytes"])
        remedy = "" if peak <= total else "give it a larger container, or plan with less --host-memory"
        for name, size in forecast_rows(memory)[:-1]:
            yield name.strip(), size, ""
        yield "peak of this run, in all", format_bytes(peak), remedy
    shared = Path("/dev/shm")
    yield "shared memory", format_bytes(free_disk(shared)) if shared.exists() else "none", ""


def _threads() -> Iterator[Finding]:
    usable, machine = num_threads(), os.cpu_count() or 1
    yield "cores for this process", f"{usable} of {machine}", ""
    asked = os.environ.get("OMP_NUM_THREADS")
    remedy = f"unset it or set it to {usable}" if asked and asked != str(usable) else ""
    yield "OMP_NUM_THREADS", asked or "not set", remedy
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    remedy = "" if policy.upper() == "PASSIVE" else "set it to PASSIVE: threads that spin take cores from the feed"
    yield "OMP_WAIT_POLICY", policy, remedy


def _packages() -> Iterator[Finding]:
    import torch

    cuda = (
        f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices" if torch.cuda.is_available() else "CPU only"
    )
    yield "torch", f"{torch.__version__} ({cuda})", ""
    for name, extra in (("dgl", "dgl"), ("torch_geometric", "pyg"), ("ray", "ray")):
        found = package_version(name)
        remedy = "" if found else f"optional: {install_command(extra)}"
        if name == "dgl" and (found or "1") >= "2":
            remedy = f"dgl 2 does not import with this torch; {install_command('dgl')}"
        yield name, found or "not installed", remedy


def _kernels() -> Iterator[Finding]:
    remedy = "set NUMBA_CACHE_DIR to a folder that lasts: there, kernels may be compiled anew after every restart"
    yield "compiled kernels", str(cache.cache_folder()), remedy if cache.is_temporary() else ""


def findings(folder: Path) -> list[Finding]:
    """Everything that is checked, in order."""
    return [*_disk(folder), *_memory(folder), *_threads(), *_kernels(), *_packages()]


def run_doctor(folder: Path, *, as_json: bool) -> None:
    """Print the findings."""
    found = findings(folder)
    if as_json:
        print(json.dumps([{"check": name, "value": value, "remedy": remedy} for name, value, remedy in found]))
        return
    print_table(
        f"doctor: {folder.resolve()}",
        [(name, f"{value}  -> {remedy}" if remedy else value) for name, value, remedy in found],
    )
