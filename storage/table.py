"""Read rows by node id from the feature table, in few large reads.

Sorted ids that lie near each other come with one read: reading a gap of up to `_GAP_BYTES` costs less than a second
request (2 GB/s and 0.1 ms a request on the reference machine). Restoring tiers needs this; training does not.
"""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.gather import admit_rows
from penstock.storage.directio import DirectFile, aligned_buffer, page_down, page_up
from penstock.storage.graph import GraphStore
from penstock.storage.rows import RowFormat, decode_rows, encode_rows

_GAP_BYTES = 128 << 10
_READ_BYTES = 8 << 20


class Rows(Protocol):
    """Open rows by node id; `bytes_read` counts."""

    bytes_read: int

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """Put the rows of ascending `ids` int [n] into `out` uint8 [n, row_bytes]."""


class RowSource(Protocol):
    """Where rows come from when tiers are restored: the feature table of a graph, or whoever has one."""

    fingerprint: str

    def open_rows(self, row_format: RowFormat) -> AbstractContextManager[Rows]:
        """Open it for rows of a format."""


class StoredRows:
    """The rows of a graph store on this host; a `RowSource`."""

    def __init__(self, graph: GraphStore) -> None:
        self._graph, self.fingerprint = graph, graph.fingerprint

    def open_rows(self, row_format: RowFormat) -> "FeatureTable":
        """See `RowSource`."""
        return FeatureTable(self._graph, row_format)


class FeatureTable:
    """The open feature table of a graph, read as rows of `row_format` (None: as stored); a context manager.

    Rows of another dtype are decoded and encoded again, exactly as the packer does it. `bytes_read` counts.
    """

    def __init__(self, graph: GraphStore, row_format: RowFormat | None = None) -> None:
        self._stored = graph.row_format
        self.row_format = row_format or graph.row_format
        self._offset, self._num_nodes = graph.feature_offset, graph.num_nodes
        self._buffer = aligned_buffer(max(_READ_BYTES, page_up(self._stored.row_bytes) + page_up(1)))
        self._file = DirectFile(graph.feature_path, "read")
        self.bytes_read = 0

    def __enter__(self) -> "FeatureTable":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """Read the rows of `ids` int [n], ascending, in [0, N), into `out` uint8 [n, row_bytes].

        ValueError where ids are out of range or not ascending, before anything is read.
        """
        if len(ids) and (ids[0] < 0 or ids[-1] >= self._num_nodes or (np.diff(ids) < 0).any()):
            raise ValueError(f"node ids must ascend within [0, {self._num_nodes}); got {ids[0]}..{ids[-1]}")
        starts = self._offset + ids.astype(np.int64) * self._stored.row_bytes
        lo = 0
        while lo < len(ids):
            hi = self._run_end(starts, lo)
            self._read_run(starts[lo:hi], out[lo:hi])
            lo = hi

    def _run_end(self, starts: NDArray[np.int64], lo: int) -> int:
        last = page_down(int(starts[lo])) + len(self._buffer) - self._stored.row_bytes
        hi = max(lo + 1, int(np.searchsorted(starts, last, side="right")))
        wide = np.flatnonzero(np.diff(starts[lo:hi]) > _GAP_BYTES + self._stored.row_bytes)
        return lo + int(wide[0]) + 1 if len(wide) else hi

    def _read_run(self, starts: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        first = page_down(int(starts[0]))
        num_bytes = page_up(int(starts[-1]) + self._stored.row_bytes - first)
        self._file.read_into(self._buffer, first, num_bytes)
        self.bytes_read += num_bytes
        same = self.row_format == self._stored
        rows = out if same else np.empty((len(out), self._stored.row_bytes), np.uint8)
        numbers = np.arange(len(starts), dtype=np.int32)
        admit_rows(numbers, numbers, 0, rows.reshape(-1), self._buffer, 0, starts - first, self._stored.row_bytes)
        if not same:
            encoded = encode_rows(decode_rows(rows, self._stored), self.row_format)
            out[:] = np.ascontiguousarray(encoded).view(np.uint8).reshape(len(out), -1)


def gather_rows(
    graph: GraphStore, ids: NDArray[Any], out: NDArray[np.uint8], row_format: RowFormat | None = None
) -> None:
    """Read the rows of ascending `ids` into `out`; see `FeatureTable.gather`."""
    with FeatureTable(graph, row_format) as table:
        table.gather(ids, out)
