"""Sort more records than fit in memory: distribute them over files by key bits, then sort each file in memory.

A record is a key, uint64, and optionally a value (a row number, an edge weight). A file that does not fit is cut again
by the next bits; a file whose keys are all equal is passed on as it is. So any skew is handled (a node with more edges
than fit in memory is cut by source), and the order of equal keys is the order in which they came.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.csc import count_buckets, scatter_by_bucket
from penstock.storage.errors import FormatError, full_disk_is_clear

Keys = NDArray[np.uint64]
_MAX_BITS = 8  # files written at once: 256, or twice that with values
_RADIX_BITS = 11  # 2048 counters and write positions stay in the first-level cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Records in a file of keys and, if they have any, a file of values."""

    keys_path: Path
    values_path: Path
    num_records: int

    def remove(self) -> None:
        """Delete the files."""
        self.keys_path.unlink(missing_ok=True)
        self.values_path.unlink(missing_ok=True)


def bucket_bits(num_records: int, capacity: int) -> int:
    """How many key bits to distribute by, so that evenly spread records fit in memory one bucket at a time."""
    wanted = -(-num_records * 3 // (2 * capacity))  # half as many again: buckets are not exactly even
    return min(_MAX_BITS, max(0, wanted - 1).bit_length())


class BucketWriter:
    """Appends records to the file of their bucket; a context manager, after which `buckets` lists all of them."""

    def __init__(self, stem: Path, num_buckets: int, value_dtype: Any | None) -> None:
        self._stem = stem
        self._paths = [(_name(stem, n, "keys"), _name(stem, n, "values")) for n in range(num_buckets)]
        self._has_values = value_dtype is not None
        self._counts = np.zeros(num_buckets, np.int64)
        self.buckets: list[Bucket] = []

    def __enter__(self) -> "BucketWriter":
        with full_disk_is_clear(self._paths[0][0]):
            self._keys = [open(keys, "wb", buffering=0) for keys, _ in self._paths]
            self._values = [open(values, "wb", buffering=0) for _, values in self._paths] if self._has_values else []
        return self

    def append(self, by: Keys, shift: int, keys: Keys, values: NDArray[Any] | None) -> None:
        """Add records to bucket (by >> shift) modulo the number of buckets."""
        mask = len(self._paths) - 1
        counts = np.zeros(mask + 1, np.int64)
        count_buckets(by, shift, mask, counts)
        self._counts += counts
        ends = np.cumsum(counts)
        self._scatter(by, shift, keys, ends - counts, ends, self._keys)
        if values is not None:
            self._scatter(by, shift, values, ends - counts, ends, self._values)

    def _scatter(self, by: Keys, shift: int, values: NDArray[Any], starts: Any, ends: Any, files: list[FileIO]) -> None:
        out = np.empty_like(values)
        scatter_by_bucket(by, values, shift, len(files) - 1, starts.copy(), out)
        for n in np.flatnonzero(ends > starts).tolist():
            view = out[starts[n] : ends[n]].data.cast("B")
            with full_disk_is_clear(self._paths[n][0]):
                while view:  # a raw write may be short
                    view = view[files[n].write(view) :]

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for file in self._keys + self._values:
            file.close()
        self.buckets = spilled_buckets(self._stem, self._counts.tolist())


def spilled_buckets(stem: Path, records: list[int]) -> list[Bucket]:
    """List the buckets that a `BucketWriter` wrote at `stem`, given how many records are in each."""
    return [
        Bucket(keys_path=_name(stem, n, "keys"), values_path=_name(stem, n, "values"), num_records=count)
        for n, count in enumerate(records)
    ]


def _name(stem: Path, n: int, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}-{n:03d}.{suffix}")


class Sorter:
    """Sorts buckets in buffers that take `num_bytes` and are allocated once. Not safe for several threads."""

    def __init__(self, num_bytes: int, value_dtype: Any | None) -> None:
        self._value_dtype = None if value_dtype is None else np.dtype(value_dtype)
        # keys alone are sorted in place; with values, every radix pass goes from one pair of buffers to the other
        record_bytes = 8 if self._value_dtype is None else 2 * (8 + self._value_dtype.itemsize)
        self.capacity = max(1024, num_bytes // record_bytes)
        self._keys = [np.empty(self.capacity, np.uint64)]
        self._values: list[NDArray[Any]] = []
        if self._value_dtype is not None:
            self._keys.append(np.empty(self.capacity, np.uint64))
            self._values = [np.empty(self.capacity, self._value_dtype) for _ in range(2)]

    def runs(self, bucket: Bucket, key_bits: int) -> Iterator[tuple[Keys, NDArray[Any] | None]]:
        """Yield the records in key order, in parts that are views of the buffers and valid until the next.

        `key_bits`: how many low bits of the keys differ. Equal keys come in one part, unless they alone exceed the
        buffers; then all parts of them hold nothing else.
        """
        if bucket.num_records == 0:
            return
        if bucket.num_records <= self.capacity:
            yield self._sorted(*self._read(bucket, 0, bucket.num_records), key_bits)
        elif key_bits == 0:
            for at in range(0, bucket.num_records, self.capacity):
                yield self._read(bucket, at, min(self.capacity, bucket.num_records - at))
        else:
            for part in self._cut(bucket, key_bits):
                yield from self.runs(part, key_bits - min(key_bits, _MAX_BITS))
                part.remove()

    def _cut(self, bucket: Bucket, key_bits: int) -> list[Bucket]:
        bits = min(key_bits, _MAX_BITS)
        stem = bucket.keys_path.with_suffix("")
        with BucketWriter(stem, 1 << bits, self._value_dtype) as writer:
            step = max(1, self.capacity // 2)
            for at in range(0, bucket.num_records, step):
                keys, values = self._read(bucket, at, min(step, bucket.num_records - at))
                writer.append(keys, key_bits - bits, keys, values)
        return writer.buckets

    def _read(self, bucket: Bucket, first: int, count: int) -> tuple[Keys, NDArray[Any] | None]:
        keys = _read_into(bucket.keys_path, first, self._keys[0][:count])
        if self._value_dtype is None:
            return keys, None
        return keys, _read_into(bucket.values_path, first, self._values[0][:count])

    def _sorted(self, keys: Keys, values: NDArray[Any] | None, key_bits: int) -> tuple[Keys, NDArray[Any] | None]:
        if values is None:
            keys.sort()
            return keys, None
        at, count = 0, len(keys)
        for shift in range(0, key_bits, _RADIX_BITS):
            bits = min(_RADIX_BITS, key_bits - shift)
            counts = np.zeros(1 << bits, np.int64)
            keys, values = self._keys[at][:count], self._values[at][:count]
            count_buckets(keys, shift, (1 << bits) - 1, counts)
            starts = np.cumsum(counts) - counts
            at = 1 - at
            scatter_by_bucket(keys, values, shift, (1 << bits) - 1, starts.copy(), self._values[at])
            scatter_by_bucket(keys, keys, shift, (1 << bits) - 1, starts, self._keys[at])
        return self._keys[at][:count], self._values[at][:count]


def _read_into(path: Path, first: int, out: NDArray[Any]) -> NDArray[Any]:
    view = out.data.cast("B")
    with open(path, "rb", buffering=0) as file:
        file.seek(first * out.itemsize, os.SEEK_SET)
        while view:
            count = file.readinto(view)
            if not count:
                raise FormatError(f"{path} is shorter than was written; delete the unfinished folder and start again")
            view = view[count:]
    return out
