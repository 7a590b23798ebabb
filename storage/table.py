"""Read rows by node id from the feature table, in whole blocks that are verified, neighbouring ones with one read.

Restoring tiers and loading everything need this; training does not. Rows that lie far apart cost their blocks: where a
tier holds less than a row per MiB of the table, up to 250 times the pages that the rows lie in, and never more than one
pass over the table.
"""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.gather import admit_rows
from penstock.storage.blocks import BLOCK_BYTES, block_up
from penstock.storage.directio import DirectFile, aligned_buffer, page_up
from penstock.storage.graph import GraphStore
from penstock.storage.rows import RowFormat, decode_rows, encode_rows

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

    Every block that is read is compared with its checksum, if the store has them; FormatError where one differs.
    Rows of another dtype are decoded and encoded again, exactly as the packer does it. `bytes_read` counts.
    """

    def __init__(self, graph: GraphStore, row_format: RowFormat | None = None) -> None:
        self._stored = graph.row_format
        self.row_format = row_format or graph.row_format
        self._offset, self._num_nodes = graph.feature_offset, graph.num_nodes
        # a row may lie in one block more than its bytes fill
        largest = max(_READ_BYTES, block_up(self._stored.row_bytes) + BLOCK_BYTES)
        self._buffer = aligned_buffer(min(largest, block_up(graph.feature_bytes)))
        self._sums, self._bytes = graph.feature_sums, graph.feature_bytes
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
        starts = ids.astype(np.int64) * self._stored.row_bytes
        first, last = starts // BLOCK_BYTES, (starts + self._stored.row_bytes - 1) // BLOCK_BYTES
        breaks = np.flatnonzero(first[1:] > last[:-1] + 1) + 1
        lo = 0
        for stop in [*breaks.tolist(), len(ids)]:
            while lo < stop:
                reach = int(first[lo]) + len(self._buffer) // BLOCK_BYTES
                hi = min(stop, int(np.searchsorted(last, reach)))
                self._read_blocks(int(first[lo]), int(last[hi - 1]) + 1)
                self._take(starts[lo:hi] - int(first[lo]) * BLOCK_BYTES, out[lo:hi])
                lo = hi

    def _read_blocks(self, first: int, past: int) -> None:
        """Fill the buffer with these blocks, verified."""
        start, stop = first * BLOCK_BYTES, min(past * BLOCK_BYTES, self._bytes)
        num_bytes = page_up(stop - start)
        self._file.read_into(self._buffer, self._offset + start, num_bytes)
        self.bytes_read += num_bytes
        if self._sums is not None:
            self._sums.verify(start, self._buffer[: stop - start])

    def _take(self, starts: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy the rows that start at these bytes of the buffer."""
        same = self.row_format == self._stored
        rows = out if same else np.empty((len(out), self._stored.row_bytes), np.uint8)
        numbers = np.arange(len(starts), dtype=np.int32)
        admit_rows(numbers, numbers, 0, rows.reshape(-1), self._buffer, 0, starts, self._stored.row_bytes)
        if not same:
            encoded = encode_rows(decode_rows(rows, self._stored), self.row_format)
            out[:] = np.ascontiguousarray(encoded).view(np.uint8).reshape(len(out), -1)


def gather_rows(
    graph: GraphStore, ids: NDArray[Any], out: NDArray[np.uint8], row_format: RowFormat | None = None
) -> None:
    """Read the rows of ascending `ids` into `out`; see `FeatureTable.gather`."""
    with FeatureTable(graph, row_format) as table:
        table.gather(ids, out)
