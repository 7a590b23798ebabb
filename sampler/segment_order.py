"""Bring shared segments from node id order, in which the scan writes them, into their own order, bucket by bucket.

A bucket is sorted in memory and written beside the packs first; only when that copy is safe does it replace the bucket,
so that a kill at any point loses nothing.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.pack import scatter_words
from penstock.sampler.plan import Plan
from penstock.sampler.recording import SharedArrays
from penstock.sampler.streams import Region
from penstock.storage.directio import IO_BYTES, PAGE, DirectFile, page_up
from penstock.storage.manifest import fsync_folder
from penstock.storage.pack import page_sums


def bucket_order(shared: SharedArrays, region: Region) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Node ids of a bucket's rows, ascending, and the place in the bucket where each belongs."""
    ids = shared.rows.get(region.window, region.first_row, region.first_row + region.num_rows)
    order = np.argsort(ids, kind="stable")
    return ids[order].astype(np.int64), order


def _safe_copy(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:06d}.sorted"


def sort_buckets(
    plan: Plan,
    regions: list[Region],
    files: dict[int, DirectFile],
    folder: Path,
    buffers: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    *,
    done: int,
    on_done: Callable[[int], None],
) -> None:
    """Sort buckets from number `done` on; `on_done(n)` records that n are safely in place."""
    assert plan.arrays is not None and plan.arrays.shared is not None
    row_bytes = plan.meta.row_format.row_bytes
    word = np.dtype(f"u{math.gcd(row_bytes, 8)}")
    for bucket in range(done, len(regions)):
        region, safe = regions[bucket], _safe_copy(folder, bucket)
        file, num_bytes = files[region.window], page_up(region.num_rows * row_bytes)
        rows, target = buffers
        if not safe.exists():  # else a killed run may have begun to replace the bucket
            file.read_into(rows, region.offset, num_bytes)
            _, places = bucket_order(plan.arrays.shared, region)
            used = region.num_rows * row_bytes
            scatter_words(
                rows[:used].view(word), row_bytes // word.itemsize, places, target[:used].view(word), 0, len(places)
            )
            target[used:num_bytes] = 0
            _write_safely(safe, target, num_bytes)
        else:
            with DirectFile(safe, "read") as copy:
                copy.read_into(target, 0, num_bytes)
        file.write_from(target, region.offset, num_bytes)
        file.sync()
        on_done(bucket + 1)
        safe.unlink()


def _write_safely(path: Path, buffer: NDArray[np.uint8], num_bytes: int) -> None:
    partial = path.with_suffix(".partial")
    with DirectFile(partial, "write") as file:
        file.truncate(0)
        file.write_from(buffer, 0, num_bytes)
        file.sync()
    os.replace(partial, path)
    fsync_folder(path.parent)


def segment_sums(file: DirectFile, num_bytes: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """xxh3-64 of every page among the first bytes of a window's file."""
    step, sums = min(len(buffer), IO_BYTES), np.empty(num_bytes // PAGE, np.uint64)
    for offset in range(0, num_bytes, step):
        count = min(step, num_bytes - offset)
        file.read_into(buffer, offset, count)
        sums[offset // PAGE : (offset + count) // PAGE] = page_sums(buffer[:count].data)
    return sums
