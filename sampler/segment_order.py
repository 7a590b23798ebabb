"""Bring shared segments from node id order, in which the scan writes them, into their own order, bucket by bucket.

A bucket is sorted in memory and written beside the packs first; only when that copy is safe does it replace the bucket,
so that a kill at any point loses nothing. The copy has its checksum in its name; the journal keeps it until pages have
checksums of their own, so nothing is published that was read back otherwise than it was written.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.kernels.pack import scatter_words
from penstock.sampler.plan import Plan
from penstock.sampler.recording import SharedArrays
from penstock.sampler.streams import Region
from penstock.storage.directio import DirectFile, page_up
from penstock.storage.errors import FormatError
from penstock.storage.manifest import fsync_folder
from penstock.storage.pack import page_sums


def bucket_order(shared: SharedArrays, region: Region) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Node ids of a bucket's rows, ascending, and the place in the bucket where each belongs."""
    ids = shared.rows.get(region.window, region.first_row, region.first_row + region.num_rows)
    order = np.argsort(ids, kind="stable")
    return ids[order].astype(np.int64), order


def safe_copy(folder: Path, bucket: int) -> Path | None:
    """The sorted copy of a bucket that a killed run left."""
    return next(folder.glob(f"bucket-{bucket:06d}.*.sorted"), None)


def sort_buckets(
    plan: Plan,
    regions: list[Region],
    files: dict[int, DirectFile],
    folder: Path,
    buffers: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    written: Sequence[int],
    *,
    done: int,
    on_done: Callable[[int, int], None],
) -> None:
    """Sort buckets from number `done` on; `on_done(n, xxh3)` records that n are safely in place, the last as this.

    `written` are sums of what was appended to each bucket. FormatError where other bytes are read back.
    """
    for bucket in range(done, len(regions)):
        region, safe = (
            regions[bucket],
            safe_copy(folder, bucket),
        )  # there is one: a killed run may be replacing the bucket
        file, num_bytes = files[region.window], _bucket_bytes(plan, region)
        if safe is None:
            _sort_bucket(plan, region, file, buffers, written[bucket])
            found = xxhash.xxh3_64_intdigest(buffers[1][:num_bytes].data)
            safe = folder / f"bucket-{bucket:06d}.{found:016x}.sorted"
            _write_safely(safe, buffers[1], num_bytes)
        else:
            with DirectFile(safe, "read") as copy:
                copy.read_into(buffers[1], 0, num_bytes)
            found = xxhash.xxh3_64_intdigest(buffers[1][:num_bytes].data)
            if f"{found:016x}" != safe.name.split(".")[1]:
                raise _damaged(safe, 0)
        file.write_from(buffers[1], region.offset, num_bytes)
        file.sync()
        on_done(bucket + 1, found)
        safe.unlink()


def _bucket_bytes(plan: Plan, region: Region) -> int:
    return page_up(region.num_rows * plan.meta.row_format.row_bytes)


def _damaged(path: Path, offset: int) -> FormatError:
    return FormatError(
        f"{path} does not have at byte {offset} what was written there: the disk damaged it; run the same command "
        "again, it packs anew"
    )


def _sort_bucket(
    plan: Plan, region: Region, file: DirectFile, buffers: tuple[NDArray[np.uint8], NDArray[np.uint8]], written: int
) -> None:
    """Read a bucket into the first buffer, sort it into the second."""
    assert plan.arrays is not None and plan.arrays.shared is not None
    rows, target = buffers
    row_bytes, num_bytes = plan.meta.row_format.row_bytes, _bucket_bytes(plan, region)
    word = np.dtype(f"u{math.gcd(row_bytes, 8)}")
    file.read_into(rows, region.offset, num_bytes)
    if xxhash.xxh3_64_intdigest(rows[:num_bytes].data) != written:
        raise _damaged(file.path, region.offset)
    _, places = bucket_order(plan.arrays.shared, region)
    used = region.num_rows * row_bytes
    scatter_words(rows[:used].view(word), row_bytes // word.itemsize, places, target[:used].view(word), 0, len(places))
    target[used:num_bytes] = 0


def _write_safely(path: Path, buffer: NDArray[np.uint8], num_bytes: int) -> None:
    partial = path.with_suffix(".partial")
    with DirectFile(partial, "write") as file:
        file.truncate(0)
        file.write_from(buffer, 0, num_bytes)
        file.sync()
    os.replace(partial, path)
    fsync_folder(path.parent)


def segment_sums(
    plan: Plan, regions: Iterable[Region], sums: Iterable[int], file: DirectFile, buffer: NDArray[np.uint8]
) -> NDArray[np.uint64]:
    """xxh3-64 of every page of a window's shared segment, of its buckets one by one, which have `sums`.

    FormatError where one has another by now.
    """
    found = [np.empty(0, np.uint64)]
    for region, wanted in zip(regions, sums, strict=True):
        num_bytes = _bucket_bytes(plan, region)
        file.read_into(buffer, region.offset, num_bytes)
        if xxhash.xxh3_64_intdigest(buffer[:num_bytes].data) != wanted:
            raise _damaged(file.path, region.offset)
        found.append(page_sums(buffer[:num_bytes].data))
    return np.concatenate(found)
