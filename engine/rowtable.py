"""Read rows of a table on disk by ascending ids: from memory where the table fits, else in few large reads.

Neither path maps the file, so what is resident is what the caller budgeted: the table, or one read buffer. Both read
whole blocks and compare them with their checksums.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.parallel import parallel_for
from penstock.storage.blocks import BLOCK_BYTES, BlockSums, block_up
from penstock.storage.directio import IO_BYTES, PAGE, DirectFile, aligned_buffer, page_up


def buffer_bytes(row_bytes: int) -> int:
    """Size of the read buffer of a table that is not resident."""
    return max(IO_BYTES, block_up(row_bytes) + BLOCK_BYTES)


class RowTable:
    """`num_rows` rows of `row_bytes` from byte 4096 of a file on; a context manager, not safe for several threads.

    FormatError where a block differs from `sums`; None reads unverified.
    """

    def __init__(
        self, path: Path, row_bytes: int, num_rows: int, sums: BlockSums | None, *, resident: bool, threads: int
    ) -> None:
        self.path, self.row_bytes, self.num_rows, self._threads = path, row_bytes, num_rows, threads
        self._file, self._sums = DirectFile(path, "read"), sums
        self._rows: NDArray[np.uint8] | None = None
        self._table_bytes = num_rows * row_bytes
        self._buffer = aligned_buffer(self._table_bytes if resident else buffer_bytes(row_bytes))
        if resident:
            for start in range(0, self._table_bytes, IO_BYTES):
                self._read(start, min(start + IO_BYTES, self._table_bytes), self._buffer[start:])
            self._rows = self._buffer[: self._table_bytes].reshape(num_rows, row_bytes)

    def _read(self, start: int, stop: int, buffer: NDArray[np.uint8]) -> None:
        """Fill the buffer with bytes of the table, whole blocks of it, verified."""
        self._file.read_into(buffer, PAGE + start, page_up(stop - start))
        if self._sums is not None:
            self._sums.verify(start, buffer[: stop - start])

    def __enter__(self) -> "RowTable":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """Copy rows `ids` [n], strictly ascending, to `out` uint8 [n, row_bytes]."""
        rows = self._rows
        if rows is None:
            self._gather_from_disk(ids, out)
            return

        def copy(lo: int, hi: int) -> None:
            np.take(rows, ids[lo:hi], axis=0, out=out[lo:hi], mode="clip")  # "raise" would buffer the output

        parallel_for(copy, len(ids), self._threads)

    def _gather_from_disk(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        starts = ids.astype(np.int64) * self.row_bytes
        first, last = starts // BLOCK_BYTES, (starts + self.row_bytes - 1) // BLOCK_BYTES
        breaks = np.flatnonzero(first[1:] > last[:-1] + 1) + 1
        lo = 0
        for stop in [*breaks.tolist(), len(ids)]:
            while lo < stop:
                reach = int(first[lo]) + len(self._buffer) // BLOCK_BYTES
                hi = min(stop, int(np.searchsorted(last, reach)))
                self._read_run(ids[lo:hi], int(first[lo]), int(last[hi - 1]) + 1, out[lo:hi])
                lo = hi

    def _read_run(self, ids: NDArray[Any], first: int, past: int, out: NDArray[np.uint8]) -> None:
        start = first * BLOCK_BYTES
        self._read(start, min(past * BLOCK_BYTES, self._table_bytes), self._buffer)
        at = int(ids[0]) * self.row_bytes - start
        count = int(ids[-1]) - int(ids[0]) + 1
        rows = self._buffer[at : at + count * self.row_bytes].reshape(count, self.row_bytes)
        np.take(rows, ids - ids[0], axis=0, out=out, mode="clip")
