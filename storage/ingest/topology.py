"""Sorted edges become `indptr`, `indices` and weights, front to back."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.csc import merge_sorted, row_ends, unique_sorted
from penstock.storage.directio import PAGE
from penstock.storage.errors import DataError, full_disk_is_clear
from penstock.storage.graph import id_dtype
from penstock.storage.ingest.edges import KeyLayout, Weights
from penstock.storage.ingest.spill import Keys, Sorter, spilled_buckets
from penstock.storage.manifest import FileEntry, checksum_file
from penstock.storage.npyfile import NpyWriter, npy_entry, npy_header
from penstock.storage.progress import Progress

_EMIT = 1 << 18  # rows or edges converted at a time
Run = tuple[Keys, Weights]


class GrowingNpy:
    """A `.npy` of one dimension whose length is known only at the end; the header page is written last."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self.entry: FileEntry | None = None

    def __enter__(self) -> "GrowingNpy":
        with full_disk_is_clear(self.path):
            self._file = open(self.path, "wb")
            self._file.write(bytes(PAGE))
        return self

    def append(self, values: NDArray[Any]) -> None:
        """Add values, cast to the file's dtype."""
        with full_disk_is_clear(self.path):
            self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with full_disk_is_clear(self.path), self._file as file:
            if kind is not None:
                return
            file.seek(0)
            file.write(npy_header(self.dtype, (self.length,)))
            file.flush()
            os.fsync(file.fileno())
        self.entry = npy_entry(self.path, checksum_file(self.path))


class RowEnds:
    """Writes `indptr` from sorted keys: an entry as soon as all edges of its node have passed."""

    def __init__(self, writer: NpyWriter, num_nodes: int, source_bits: int) -> None:
        self._writer, self._num_nodes, self._source_bits = writer, num_nodes, source_bits
        self._next, self._total = 0, 0  # the first node whose end is open, and the edges so far
        self._buffer = np.empty(min(_EMIT, num_nodes), np.int64)
        writer.append(np.zeros(1, np.int64))

    def append(self, keys: Keys, first: int) -> None:
        """Take a run of keys [n >= 1] whose local destinations count from `first`."""
        self._fill(first)
        last, at = first + int(keys[-1] >> np.uint64(self._source_bits)), 0
        while self._next < last:
            out = self._buffer[: last - self._next]
            at = row_ends(keys, self._source_bits, self._next - first, at, self._total, out)
            self._writer.append(out)
            self._next += len(out)
        self._total += len(keys)

    def finish(self) -> None:
        """Close all nodes."""
        self._fill(self._num_nodes)

    def _fill(self, stop: int) -> None:
        while self._next < stop:
            out = self._buffer[: stop - self._next]
            out[:] = self._total
            self._writer.append(out)
            self._next += len(out)


def _float32(total: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows is Inf, and refused by the caller
        return total.astype(np.float32)


def merged_runs(runs: Iterator[Run]) -> Iterator[Run]:
    """Merge edges with equal keys; their weights are added up in float64, in the order in which they came.

    Runs that hold one key only are held back until another comes: the key may have filled several.
    """
    held: Keys | None = None
    total = np.zeros(1)
    for keys, weights in runs:
        if held is not None and keys[0] != held[0]:
            yield held, None if weights is None else _float32(total)
            held = None
        if keys[0] == keys[-1]:
            if held is None:
                held, total = keys[:1].copy(), np.zeros(1)
            if weights is not None:
                for lo in range(0, len(weights), _EMIT):  # a running sum, and not NumPy's pairwise one
                    total = np.cumsum(np.concatenate([total, weights[lo : lo + _EMIT]]))[-1:]
            continue
        if weights is None:
            yield keys[: unique_sorted(keys)], None
        else:
            count = merge_sorted(keys, weights)
            yield keys[:count], weights[:count]
    if held is not None:
        yield held, None if weights is None else _float32(total)


def _refuse_overflow(keys: Keys, weights: NDArray[np.float32], layout: KeyLayout, bucket: int) -> None:
    """Raise DataError where the weights of merged edges add up to more than float32 holds."""
    if len(weights) and weights.max() == np.inf:
        key = int(keys[int(weights.argmax())])
        src = key & ((1 << layout.source_bits) - 1)
        dst = (bucket << layout.local_bits) + (key >> layout.source_bits)
        raise DataError(
            f"the weights of the edges from node row {src} to node row {dst}, which are merged into one, add up to "
            "more than float32's largest, 3.4e38; scale the weights"
        )


def write_topology(
    out: Path,
    work: Path,
    num_nodes: int,
    layout: KeyLayout,
    records: list[int],
    *,
    weighted: bool,
    merge: bool,
    host_memory: int,
    progress: Progress,
) -> tuple[dict[str, Any], tuple[FileEntry, ...]]:
    """Sort the spilled ranges one by one; reports the number of edges."""
    weight_dtype = np.dtype(np.float32) if weighted else None
    sorter = Sorter(host_memory // 2, weight_dtype)
    mask = np.uint64((1 << layout.source_bits) - 1)
    indptr = NpyWriter(out / "indptr.npy", np.int64, (num_nodes + 1,))
    indices = GrowingNpy(out / "indices.npy", id_dtype(num_nodes))
    all_weights = GrowingNpy(out / "edge_weights.npy", np.float32)
    read = 0
    with indptr, indices, all_weights:
        rows = RowEnds(indptr, num_nodes, layout.source_bits)
        for n, bucket in enumerate(spilled_buckets(work / "edges", records)):
            runs = sorter.runs(bucket, layout.key_bits)
            for keys, weights in merged_runs(runs) if merge else runs:
                if merge and weights is not None:
                    _refuse_overflow(keys, weights, layout, n)
                rows.append(keys, n << layout.local_bits)
                for lo in range(0, len(keys), _EMIT):
                    indices.append(keys[lo : lo + _EMIT] & mask)
                if weights is not None:
                    all_weights.append(weights)
            read += bucket.num_records
            progress("sort edges", read, sum(records), "edges")
        rows.finish()
    entries = [indptr.entry, indices.entry, all_weights.entry]
    if not weighted:
        (out / "edge_weights.npy").unlink()
        entries.pop()
    return {"num_edges": indices.length}, tuple(entry for entry in entries if entry is not None)
