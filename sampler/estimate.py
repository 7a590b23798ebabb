"""What a plan will cost, before a byte is packed: bytes per tier, time from a short measurement of the disk.

Times are those of reading alone: computing hides them where it is slower. All rates are measured past the page cache.
"""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from penstock.storage.budget import GIB, MIB, format_bytes, free_disk, require_free_disk
from penstock.storage.directio import IO_BYTES, PAGE, DirectFile, aligned_buffer, page_down

_PROBE_BYTES = 64 * MIB
_RANDOM_THREADS = 16
_RANDOM_S = 0.1
Layout = Literal["private", "shared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Bytes per second of large sequential transfers, and 4 KiB random reads per second with 16 in flight."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    random_reads_per_s: float


def _random_reads(file: DirectFile, probe_bytes: int, seconds: float) -> float:
    end = time.perf_counter() + seconds

    def count_reads(seed: int) -> int:
        rng, buffer, done = np.random.default_rng(seed), aligned_buffer(PAGE), 0
        while time.perf_counter() < end:
            file.read_into(buffer, int(rng.integers(probe_bytes // PAGE)) * PAGE, PAGE)
            done += 1
        return done

    with ThreadPoolExecutor(_RANDOM_THREADS) as pool:
        return sum(pool.map(count_reads, range(_RANDOM_THREADS))) / seconds


def measure_disk(folder: Path) -> DiskRates:
    """Write, read and sample a file of 64 MiB in `folder`, in about half a second; the file is removed.

    It never takes more than a quarter of what is free. DoesNotFit where that is less than 1 MiB.
    """
    probe_bytes = min(_PROBE_BYTES, page_down(free_disk(folder) // 4))
    require_free_disk(folder, 4 * MIB, "measuring the disk")
    path = folder / f".penstock-probe-{os.getpid()}"
    buffer = aligned_buffer(IO_BYTES)
    buffer[:] = np.random.default_rng(0).integers(0, 256, len(buffer), np.uint8)
    try:
        with DirectFile(path, "write") as file:
            file.reserve(probe_bytes)
            start = time.perf_counter()
            for offset in range(0, probe_bytes, IO_BYTES):
                file.write_from(buffer, offset, min(IO_BYTES, probe_bytes - offset))
            file.sync()
            write_s = time.perf_counter() - start
        with DirectFile(path, "read") as file:
            start = time.perf_counter()
            for offset in range(0, probe_bytes, IO_BYTES):
                file.read_into(buffer, offset, min(IO_BYTES, probe_bytes - offset))
            read_s = time.perf_counter() - start
            random_reads = _random_reads(file, probe_bytes, _RANDOM_S)
    finally:
        path.unlink(missing_ok=True)
    return DiskRates(
        read_bytes_per_s=probe_bytes / max(read_s, 1e-9),
        write_bytes_per_s=probe_bytes / max(write_s, 1e-9),
        random_reads_per_s=max(random_reads, 1.0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """The figures of a plan. `*_rows` and `*_bytes_per_epoch` are means over the epochs of the trace.

    `read_amplification` is bytes read from packs over the bytes of all rows that items use, from whatever tier: a plan
    that keeps more in memory has less. `break_even_epochs` says after how many epochs packing has paid off against
    reading missing rows in 4 KiB pieces from the feature table, None where it never does.
    """

    mode: Literal["reuse", "rolling"]
    layout: Layout
    policy: str
    row_dtype: str
    row_bytes: int
    num_items: int
    items_per_epoch: int
    window_items: int
    num_windows: int
    device_slots: int
    host_slots: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    input_rows_per_epoch: int
    device_hit_rows_per_epoch: int
    host_hit_rows_per_epoch: int
    missing_rows_per_epoch: int
    missing_bytes_per_epoch: int
    read_bytes_per_epoch: int
    read_amplification: float | None
    pack_bytes: int
    feature_bytes: int
    pack_over_features: float
    scratch_bytes: int
    disk_needed_bytes: int
    host_needed_bytes: int
    planning_memory_bytes: int
    max_extent_bytes: int
    max_inputs: int
    read_s_per_epoch: float
    pack_s: float
    random_read_s_per_epoch: float
    break_even_epochs: int | None
    disk_rates: DiskRates


def random_read_s(missing_rows: float, row_bytes: int, rates: DiskRates) -> float:
    """Time to read rows one by one in the 4 KiB pages that hold them (a row straddles a boundary now and then)."""
    pages = 1 + (row_bytes - 1) / PAGE
    return missing_rows * pages / rates.random_reads_per_s


def sequential_s(read_bytes: float, num_reads: float, rates: DiskRates) -> float:
    """Time to read long runs: the bytes at full rate, and one random read's share per run."""
    return read_bytes / rates.read_bytes_per_s + num_reads / rates.random_reads_per_s


def break_even(pack_s: float, random_s: float, packed_s: float) -> int | None:
    """Epochs after which packing once and reading packs beats random reads."""
    return math.ceil(pack_s / (random_s - packed_s)) if random_s > packed_s else None


def _break_even(summary: PlanSummary) -> str:
    """After how many epochs packing pays, in words."""
    if summary.missing_rows_per_epoch == 0:
        return "at once: all rows that items use stay in memory"
    if (epochs := summary.break_even_epochs) is None:
        return "never: this disk reads rows one by one as fast as packs; packs are needed all the same"
    return f"after {epochs} epochs, against reading missing rows one by one"


def _share(summary: PlanSummary, kept_bytes: int) -> str:
    """What the host memory of a plan is, where evaluation keeps some of what was given."""
    of = f"{format_bytes(summary.host_needed_bytes)} of {format_bytes(summary.host_bytes)}"
    given = format_bytes(summary.host_bytes + kept_bytes)
    return f"{of}: {given} less {format_bytes(kept_bytes)} that evaluation keeps" if kept_bytes else of


def summary_rows(summary: PlanSummary, *, kept_bytes: int = 0) -> list[tuple[str, str]]:
    """What `penstock plan` prints: pairs of a label and a value. Evaluation keeps `kept_bytes` of host memory."""
    rows = max(1, summary.input_rows_per_epoch)
    rates, ratio = summary.disk_rates, summary.read_amplification or 0.0

    def tier(hit_rows: int) -> str:
        return f"{format_bytes(hit_rows * summary.row_bytes)} per epoch ({100 * hit_rows / rows:.1f} % of rows)"

    return [
        ("mode", f"{summary.mode}, {summary.layout} rows, policy {summary.policy}, {summary.row_dtype}"),
        ("items", f"{summary.num_items} ({summary.items_per_epoch} per epoch) in {summary.num_windows} windows"),
        ("device tier", f"{summary.device_slots} rows, serves {tier(summary.device_hit_rows_per_epoch)}"),
        ("host tier", f"{summary.host_slots} rows, serves {tier(summary.host_hit_rows_per_epoch)}"),
        ("from packs", tier(summary.missing_rows_per_epoch)),
        ("read per epoch", f"{format_bytes(summary.read_bytes_per_epoch)}, {ratio:.2f} x the rows that items use"),
        ("packs", f"{format_bytes(summary.pack_bytes)}, {summary.pack_over_features:.2f} x the features"),
        ("disk needed", f"{format_bytes(summary.disk_needed_bytes)} of {format_bytes(summary.disk_bytes)}"),
        ("host memory needed", _share(summary, kept_bytes)),
        ("planning memory", format_bytes(summary.planning_memory_bytes)),
        (
            "disk",
            f"read {rates.read_bytes_per_s / GIB:.2f} GiB/s, write {rates.write_bytes_per_s / GIB:.2f} GiB/s, "
            f"{rates.random_reads_per_s:.0f} random reads/s",
        ),
        ("expected reading", f"{summary.read_s_per_epoch:.1f} s per epoch"),
        ("packing", f"{summary.pack_s:.1f} s"),
        ("random 4 KiB reads", f"{summary.random_read_s_per_epoch:.1f} s per epoch instead"),
        ("packing pays", _break_even(summary)),
    ]
